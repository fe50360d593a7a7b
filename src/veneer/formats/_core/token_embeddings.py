"""Token embeddings and their text encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.injection import Attachment, LoadError, SaveError, attach, methods
from veneer.injection.sites import VocabularySite

from .._io.reader import SUFFIX, File, read
from .format import format_of

UNNAMED = "emb_params"  # key used by sd-scripts: one tensor, without a token
Rows = list[tuple[VocabularySite, Tensor]]
ENCODERS = {"clip_l": "CLIP", "clip_g": "CLIP", "t5": "T5", "t5xxl": "T5"}


def encoder_names(attachment: Attachment, target: Path) -> dict[str, str]:
    """Site name -> conventional name of its text encoder."""
    free = {"CLIP": ["clip_l", "clip_g"], "T5": ["t5"]}
    names: dict[str, str] = {}
    for site, _ in attachment.parts.values():
        kind = type(attachment.towers[site.component]).__name__
        available = free["T5" if kind.startswith("T5") else "CLIP"]
        if not available:
            message = f"{target}: the format has no name for another {kind}, '{site.component}'."
            raise SaveError(message, file=target, where=site.component, given=kind)
        names[site.name] = available.pop(0)
    return names


def encoder_of_width(file: File, width: int, places: Sequence[VocabularySite]) -> VocabularySite:
    """The first text encoder of the given width."""
    found = next((s for s in places if s.width == width), None)
    if found is None:
        message = (
            f"{file.path}: its vectors have width {width}; {_describe_encoders(places)}. It was trained for another base model."
        )
        raise LoadError(message, file=file.path, given=width, expected={s.component: s.width for s in places})
    return found


def _describe_encoders(places: Sequence[VocabularySite]) -> str:
    return (
        "the model's text encoders have width " + ", ".join(f"{s.width} ({s.component or s.name})" for s in places)
        if places
        else ("the model has no text encoder. Load it on a pipeline")
    )


def rows_by_encoder(file: File, tensors: Mapping[str, Tensor], places: Sequence[VocabularySite]) -> Rows:
    wrong = next((key for key, t in tensors.items() if t.ndim != 2), None)
    if wrong is not None:
        shape = tuple(tensors[wrong].shape)
        message = f"{file.path}: '{wrong}' has shape {shape}; expected (n, width). The file is corrupt."
        raise LoadError(message, file=file.path, where=wrong, given=shape, expected=2)
    if UNNAMED in tensors:
        if len(tensors) > 1:
            others = tuple(k for k in tensors if k != UNNAMED)
            message = f"{file.path}: '{UNNAMED}' beside {', '.join(others)}; expected one or the other."
            raise LoadError(message, file=file.path, where=UNNAMED, given=others)
        return [(encoder_of_width(file, tensors[UNNAMED].shape[1], places), tensors[UNNAMED])]
    t5 = [s for s in places if s.path.startswith("encoder.")]
    clip = [s for s in places if s not in t5]
    offered = {"clip_l": clip[:1], "clip_g": clip[1:2] or clip[:1] * (len(tensors) == 1), "t5": t5[:1], "t5xxl": t5[:1]}
    away = [key for key in tensors if not offered[key]]
    if away:
        message = (
            f"{file.path}: has vectors for {', '.join(away)}; {_describe_encoders(places)}. It was made for another pipeline."
        )
        raise LoadError(message, file=file.path, given=tuple(away), expected={s.component: s.width for s in places})
    found = [(offered[key][0], t) for key, t in tensors.items()]
    order = {s.name: i for i, s in enumerate(places)}
    return sorted(found, key=lambda part: order[part[0].name])


def check_vectors(file: File, site: VocabularySite, vectors: Tensor, tokens: int) -> None:
    if vectors.shape[1] != site.width:
        raise LoadError(
            f"{file.path}: its vectors for '{site.component or site.name}' have width {vectors.shape[1]}; the text encoder's "
            f"token embeddings have width {site.width}. It was trained for another base model.",
            file=file.path,
            where=site.component or site.name,
            given=vectors.shape[1],
            expected=site.width,
        )
    if not len(vectors) or len(vectors) % tokens:
        message = f"{file.path}: {len(vectors)} vectors for {tokens} tokens; expected a multiple. The file is corrupt."
        raise LoadError(message, file=file.path, given=len(vectors), expected=tokens)


@dataclass(frozen=True)
class TokenEmbedding:
    """One trained token.

    Args:
        config: options of a `textual_inversion` for this token only. `rows`: site name -> vectors (n, width).
    """

    token: str
    config: Mapping[str, Any]
    rows: Mapping[str, Tensor]

    @property
    def file(self) -> str:
        """The file name whose stem is the token's trigger in A1111, Forge and ComfyUI.

        >>> TokenEmbedding("<my toy>", {}, {}).file
        'my-toy.safetensors'
        """
        stem = re.sub(r"[^\w.-]+", "-", self.token)[:80].strip("-.")
        return f"{stem or 'token'}{SUFFIX}"

    def equals(self, other: TokenEmbedding) -> bool:
        """True if the rows at every text encoder are the same."""
        return self.rows.keys() == other.rows.keys() and all(torch.equal(rows, other.rows[k]) for k, rows in self.rows.items())


def token_embeddings(attachment: Attachment) -> list[TokenEmbedding]:
    """The tokens of a `textual_inversion` attachment, each with its vectors.

    Raises:
        SaveError: base parameters were trained with them.
    """
    method: Any = attachment.method
    if attachment.extras:
        raise SaveError(
            f"'{attachment.name}' also trained the base parameters {', '.join(list(attachment.extras)[:4])}; only the native "
            "format holds both.",
            where=attachment.name,
            given=tuple(attachment.extras),
        )
    n, found = method.vectors, []
    for i, (token, word) in enumerate(zip(method.each, method.words, strict=True)):
        part = slice(i * n, (i + 1) * n)
        config = {**method.config(), "tokens": token, "initialize": word, "ids": list(method.ids[part])}
        rows = _rows(attachment, part)
        found.append(TokenEmbedding(token, config, rows))
    return found


def merge_tokens(embeddings: Sequence[TokenEmbedding], target: Path) -> TokenEmbedding:
    """Several tokens as one `textual_inversion`, for a file that holds one.

    Raises:
        SaveError: they differ in the number of vectors or in their text encoders.
    """
    first = embeddings[0]
    if any(len(r) != first.config["vectors"] for e in embeddings for r in e.rows.values()) or any(
        e.rows.keys() != first.rows.keys() for e in embeddings
    ):
        message = f"{target}: its tokens differ in the number of vectors or in their text encoders. Use --to native."
        raise SaveError(message, file=target, given={e.token: tuple(e.rows) for e in embeddings})
    config = {"tokens": [e.token for e in embeddings], "initialize": [e.config["initialize"] for e in embeddings]}
    config["ids"] = [i for e in embeddings for i in e.config["ids"]]
    rows = {name: torch.cat([e.rows[name] for e in embeddings]) for name in first.rows}
    return TokenEmbedding(first.token, {**first.config, **config}, rows)


def _rows(attachment: Attachment, part: slice) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (_, adapter) in attachment.parts.items():
        found[name] = adapter.get_parameter("vectors").detach()[part].clone()
    return found


def token_files(target: Path, embeddings: Sequence[TokenEmbedding]) -> dict[str, Path]:
    """Token -> its own file beside a LoRA file, for formats that cannot hold embeddings.

    If a file of another kind has that name, the embedding goes to the folder `embeddings`, the name used by A1111 and ComfyUI.

    Raises:
        SaveError: two tokens have the same file name, or the file exists with other vectors.
    """
    found: dict[str, Path] = {}
    for each in embeddings:
        place = target.with_name(each.file)
        if place.name.casefold() == target.name.casefold() or (place.exists() and not _holds_tokens(place)):
            place = target.parent / "embeddings" / each.file
        other = next((token for token, path in found.items() if path == place), None)
        if other is not None:
            raise SaveError(
                f"{place}: the tokens '{other}' and '{each.token}' map to the same file name, which is their trigger. Use "
                "--to native, which holds all tokens.",
                file=place,
                given=(other, each.token),
            )
        if place.exists() and not _same_vectors(place, each):
            message = f"{place}: already exists with other vectors for '{each.token}'. Write to another folder."
            raise SaveError(message, file=place, where=each.token, given="exists")
        found[each.token] = place
    return found


def _holds_tokens(path: Path) -> bool:
    try:
        found = format_of(read(path))
    except LoadError:
        return False
    return found is not None and found.name == "embeddings"


def _same_vectors(path: Path, embedding: TokenEmbedding) -> bool:
    """True if a file has exactly the vectors of a token, in any order of its tensors."""
    try:
        saved = list(read(path).tensors().values())
    except LoadError:
        return False
    rows = list(embedding.rows.values())
    return len(saved) == len(rows) and all(any(torch.equal(a.float(), b.float()) for b in rows) for a in saved)


def attach_tokens(model: Any, embeddings: Sequence[TokenEmbedding]) -> list[Attachment]:
    """Attaches one `textual_inversion` per token, all or nothing.

    Raises:
        UnsupportedSite: a tokenizer already has the token.
    """
    made: list[Attachment] = []
    try:
        for each in embeddings:
            sites = [f"name:{name}" for name in each.rows]
            made.append(attach(model, methods.get("textual_inversion").from_config(each.config), where=sites))
            made[-1].load_state_dict({f"{name}:vectors": rows for name, rows in each.rows.items()})
    except BaseException:
        for attachment in reversed(made):
            attachment.detach()
        raise
    return made
