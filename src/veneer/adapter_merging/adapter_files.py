"""Adapters of files, and a LoRA into a new file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from veneer.formats import formats, load_all, look, read
from veneer.formats._core.conversion import HOLDING
from veneer.formats._core.token_embeddings import TokenEmbedding, attach_tokens, token_embeddings, token_files, unite
from veneer.formats.native import KEY
from veneer.injection import Attachment, LoadError, SaveError, VeneerError

from .delta_weights import CombineError
from .lora_from_deltas import Outcome

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EMBEDDINGS = "textual_inversion"
MERGEABLE = frozenset(
    {
        "adalora", "boft", "diffusekrona", "dora", "fact", "full", "glora", "ia3", "loha", "lokr", "lora", "lora_fa", "oft",
        "svdiff", "vera", EMBEDDINGS,
    }
)  # fmt: skip
"""Methods whose files can be merged: a weight update ΔW, or token embeddings."""


@dataclass(frozen=True)
class Content:
    """What a file holds: an adapter on the model, or None, and token embeddings, which are on no model."""

    adapter: Attachment | None
    tokens: tuple[TokenEmbedding, ...]


def read_content(model: Any, path: str | PathLike[str]) -> Content:
    """The adapter and the token embeddings of a file; the adapter stays on the model.

    Raises:
        LoadError: it does not fit. CombineError: the file holds several adapters. SaveError: base parameters were trained with
            a token.
    """
    found = load_all(model, path)
    try:
        learned = [a for a in found if a.method.name == EMBEDDINGS]
        others = [a for a in found if a not in learned]
        tokens = tuple(each for a in learned for each in token_embeddings(a))
        if len(others) > 1:
            told = ", ".join(f"{a.name} ({a.method.name})" for a in others)
            message = f"{path}: holds {told}; expected one adapter, with or without token embeddings."
            raise CombineError(message, file=path, given=tuple(a.name for a in others), expected=1)
    except BaseException:
        for attachment in reversed(found):
            attachment.detach()
        raise
    for attachment in reversed(learned):
        attachment.detach()
    return Content(others[0] if others else None, tokens)


def unite_tokens(contents: Iterable[tuple[Path, Content]]) -> list[TokenEmbedding]:
    """The token embeddings of all files, each token once.

    Raises:
        CombineError: two files have the same token with other vectors.
    """
    united: dict[str, tuple[Path, TokenEmbedding]] = {}
    for path, content in contents:
        for each in content.tokens:
            before, same = united.setdefault(each.token, (path, each))
            if not same.equals(each):
                raise CombineError(
                    f"{before.name} and {path.name}: both have trained the token '{each.token}', each its own vectors, and a "
                    "prompt can mean only one. Convert one of them to kohya's format and merge that LoRA, which comes without "
                    "the token.",
                    file=path,
                    where=each.token,
                    given=(before.name, path.name),
                )
    return [each for _, each in united.values()]


def is_mergeable(path: str | PathLike[str]) -> bool:
    """True if a file holds weight updates of a pipeline or token embeddings, and nothing else, by its header alone.

    False for classifiers, control networks, image prompts, trained base parameters and unreadable files.
    """
    try:
        found = look(path)
        header = read(path).json(KEY) if found.format == "native" else None
    except (VeneerError, OSError):
        return False
    if header is not None and ("" in header["base"] or any(entry["trained"] for entry in header["attachments"])):
        return False
    return bool(found.blocks) and all(block.method in MERGEABLE for block in found.blocks)


def free(path: str | PathLike[str], form: str) -> Path:
    """Where a file of a format will be.

    Raises:
        SaveError: something is there already.
    """
    target = formats.get(form)().place(path)
    if target.exists():
        raise SaveError(f"{target}: it is there already. Give another --out.", file=target, given="exists")
    return target


def form_of(paths: Iterable[str | PathLike[str]]) -> str:
    """The format of the first file that is not of token embeddings alone; `embeddings` if all are.

    Raises:
        LoadError: a file of no known format.
    """
    for path in paths:
        found = look(path).format
        if found is None:
            raise LoadError(f"{path}: no known format. Give --to.", file=path, option="to")
        if found != "embeddings":
            return found
    return "embeddings"


def write(
    outcome: Outcome, path: str | PathLike[str], form: str, dtype: torch.dtype, provenance: Mapping[str, Any] | None = None
) -> Path:
    """The LoRA of an outcome as a new file in `dtype`, to which its matrices are rounded already.

    Raises:
        SaveError: the format cannot hold it, or the file is there.
    """
    target = free(path, form)
    _narrow(outcome, dtype)
    return formats.get(form)().save(outcome.attachment, target, provenance)


def write_all(
    model: Any,
    outcome: Outcome | None,
    tokens: Sequence[TokenEmbedding],
    path: str | PathLike[str],
    form: str,
    dtype: torch.dtype,
    provenance: Mapping[str, Any] | None = None,
) -> list[Path]:
    """A LoRA and token embeddings: one file where the format holds both, else each token in its own file beside the LoRA.

    Raises:
        SaveError: the format cannot hold them, or a file is there.
    """
    target = free(path, form)
    lora = [] if outcome is None else [outcome.attachment]
    if outcome is not None:
        _narrow(outcome, dtype)
    if form in HOLDING:
        several = attach_tokens(model, [unite(tokens, target)] if form == "embeddings" and tokens else tokens)
        try:
            return [formats.get(form)().save([*several, *lora], target, provenance)]
        finally:
            for attachment in reversed(several):
                attachment.detach()
    if not lora:
        raise CombineError(
            f"{target}: there are only token embeddings, which {form} cannot hold. Give --to native or embeddings.",
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


def _narrow(outcome: Outcome, dtype: torch.dtype) -> None:
    for parameter in outcome.attachment.parameters():
        narrow = parameter.data.to(dtype)
        parameter.data = narrow if torch.equal(narrow.to(parameter.dtype), parameter) else parameter.data
