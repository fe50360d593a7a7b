"""Reading of adapter files to merge, and writing of the resulting LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from veneer.formats import formats, inspect, load_all, read
from veneer.formats._core.conversion import TOKEN_FORMATS
from veneer.formats._core.token_embeddings import TokenEmbedding, attach_tokens, merge_tokens, token_embeddings, token_files
from veneer.formats.native import KEY
from veneer.injection import Attachment, LoadError, SaveError, VeneerError

from .delta_weights import CombineError
from .lora_from_deltas import MergeResult

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EMBEDDINGS = "textual_inversion"
MERGEABLE = frozenset(
    {
        "adalora", "adamix_lora", "boft", "diffusekrona", "dora", "fact", "full", "glora", "ia3", "loha", "lokr", "lora",
        "lora_fa", "oft", "svdiff", "vera", EMBEDDINGS,
    }
)  # fmt: skip
"""Methods whose files can be merged: a weight update ΔW, or token embeddings."""


@dataclass(frozen=True)
class Content:
    """Contents of a file: an adapter, attached to the model, or None, and token embeddings, not attached."""

    adapter: Attachment | None
    tokens: tuple[TokenEmbedding, ...]


def read_content(model: Any, path: str | PathLike[str]) -> Content:
    """Reads the adapter and the token embeddings of a file; the adapter stays attached to the model.

    Raises:
        LoadError: incompatible with the model. CombineError: the file has several adapters. SaveError: base parameters were
            trained with a token.
    """
    found = load_all(model, path)
    try:
        learned = [a for a in found if a.method.name == EMBEDDINGS]
        others = [a for a in found if a not in learned]
        tokens = tuple(each for a in learned for each in token_embeddings(a))
        if len(others) > 1:
            names = ", ".join(f"{a.name} ({a.method.name})" for a in others)
            message = f"{path}: contains {names}; expected one adapter, with or without token embeddings."
            raise CombineError(message, file=path, given=tuple(a.name for a in others), expected=1)
    except BaseException:
        for attachment in reversed(found):
            attachment.detach()
        raise
    for attachment in reversed(learned):
        attachment.detach()
    return Content(others[0] if others else None, tokens)


def unite_tokens(contents: Iterable[tuple[Path, Content]]) -> list[TokenEmbedding]:
    """Collects the token embeddings of all files, each token once.

    Raises:
        CombineError: two files have different embeddings of the same token.
    """
    united: dict[str, tuple[Path, TokenEmbedding]] = {}
    for path, content in contents:
        for each in content.tokens:
            before, same = united.setdefault(each.token, (path, each))
            if not same.equals(each):
                raise CombineError(
                    f"{before.name} and {path.name}: different embeddings of the token '{each.token}'; expected one embedding "
                    "per token. Convert one file to kohya's format, which drops the token, and merge the converted LoRA.",
                    file=path,
                    where=each.token,
                    given=(before.name, path.name),
                )
    return [each for _, each in united.values()]


def is_mergeable(path: str | PathLike[str]) -> bool:
    """True if a file contains only weight updates of a pipeline or token embeddings. Reads the header only.

    False for classifiers, control networks, image prompts, trained base parameters and unreadable files.
    """
    try:
        found = inspect(path)
        header = read(path).json(KEY) if found.format == "native" else None
    except (VeneerError, OSError):
        return False
    if header is not None and ("" in header["base"] or any(entry["trained"] for entry in header["attachments"])):
        return False
    return bool(found.blocks) and all(block.method in MERGEABLE for block in found.blocks)


def new_file(path: str | PathLike[str], form: str) -> Path:
    """Path of a new file of a format.

    Raises:
        SaveError: the path exists.
    """
    target = formats.get(form)().place(path)
    if target.exists():
        raise SaveError(f"{target}: already exists. Choose another --out.", file=target, given="exists")
    return target


def common_format(paths: Iterable[str | PathLike[str]]) -> str:
    """The format of the first file that has more than token embeddings; `embeddings` if none has.

    Raises:
        LoadError: a file of an unknown format.
    """
    for path in paths:
        found = inspect(path).format
        if found is None:
            raise LoadError(f"{path}: unknown format. Set the output format with --to.", file=path, option="to")
        if found != "embeddings":
            return found
    return "embeddings"


def write(
    result: MergeResult, path: str | PathLike[str], form: str, dtype: torch.dtype, provenance: Mapping[str, Any] | None = None
) -> Path:
    """Writes the LoRA of a result to a new file in `dtype`, to which its matrices are already rounded.

    Raises:
        SaveError: the format does not support it, or the file exists.
    """
    target = new_file(path, form)
    _narrow(result, dtype)
    return formats.get(form)().save(result.attachment, target, provenance)


def write_all(
    model: Any,
    result: MergeResult | None,
    tokens: Sequence[TokenEmbedding],
    path: str | PathLike[str],
    form: str,
    dtype: torch.dtype,
    provenance: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes a LoRA and token embeddings, to one file if the format supports both, else each token to a file beside the LoRA.

    Raises:
        SaveError: the format does not support them, or a file exists.
    """
    target = new_file(path, form)
    lora = [] if result is None else [result.attachment]
    if result is not None:
        _narrow(result, dtype)
    if form in TOKEN_FORMATS:
        several = attach_tokens(model, [merge_tokens(tokens, target)] if form == "embeddings" and tokens else tokens)
        try:
            return [formats.get(form)().save([*several, *lora], target, provenance)]
        finally:
            for attachment in reversed(several):
                attachment.detach()
    if not lora:
        raise CombineError(
            f"{target}: only token embeddings, which the format {form} does not support. Use --to native or embeddings.",
            file=target,
            given=form,
            expected=("native", "embeddings"),
        )
    places = token_files(target, tokens)
    written = [formats.get(form)().save(lora, target, provenance)]
    for each in tokens:
        (held,) = attach_tokens(model, [each])
        try:
            written.append(formats.get("embeddings")().save(held, places[each.token], provenance))
        finally:
            held.detach()
    return written


def _narrow(result: MergeResult, dtype: torch.dtype) -> None:
    for parameter in result.attachment.parameters():
        narrow = parameter.data.to(dtype)
        parameter.data = narrow if torch.equal(narrow.to(parameter.dtype), parameter) else parameter.data
