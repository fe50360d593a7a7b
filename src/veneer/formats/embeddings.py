"""`learned_embeds.safetensors`: learned tokens, as diffusers' `load_textual_inversion` and other tools read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..injection import Attachment, LoadError, SaveError
from ..injection.sites import VocabularySite
from ..injection.towers import towers_of
from ._attaching import Wanted, attach_all
from ._format import Format, Layer, Options, listed
from ._reading import File
from ._writing import destination, write

TOKENS = "tokens"
ANY = "emb_params"  # sd-scripts: one tensor, no token
Rows = list[tuple[VocabularySite, Tensor]]
ENCODERS = {"clip_l": "CLIP", "clip_g": "CLIP", "t5": "T5", "t5xxl": "T5"}


class Embeddings(Format):
    """One text encoder: token to vectors (n, width). Several: `clip_l`, `clip_g` (the first and the second CLIP), `t5`.

    diffusers loads the first by itself, `pipe.load_textual_inversion(file)`, and the second tensor by tensor,
    `pipe.load_textual_inversion(tensors["clip_g"], token=…, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)`.
    The tokens of the second are in the header's `tokens`, a JSON list; vectors of several tokens follow one another.

    Read as well: one tensor `emb_params` (sd-scripts). Where a file says no token, its name is the token, `<name>`, or the one
    that is given.
    Source: diffusers 0.42 `loaders/textual_inversion.py` and its advanced SDXL and FLUX training scripts.
    """

    name: ClassVar[str] = "embeddings"
    file: ClassVar[str] = "learned_embeds.safetensors"
    order: ClassVar[int] = 2

    def reads(self, file: File) -> bool:
        if not file.shapes or len(file.shapes) > 64:
            return False
        rows = all(len(shape) in (1, 2) for shape in file.shapes.values())
        named = set(file.shapes) <= {*ENCODERS, ANY}
        one_width = len({shape[-1:] for shape in file.shapes.values()}) == 1
        tokens = not any(key.endswith((".weight", ".bias")) or ":" in key for key in file.shapes)
        return rows and (named or (one_width and tokens))

    def layers(self, file: File) -> list[Layer]:
        return [Layer(key, "textual_inversion", values=math.prod(shape)) for key, shape in file.shapes.items()]

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        tensors = {key: t[None] if t.ndim == 1 else t for key, t in file.tensors(finite=options.strict).items()}
        order = file.json(TOKENS)
        if isinstance(order, list) and all(isinstance(t, str) for t in order) and sorted(order) == sorted(tensors):
            tensors = {token: tensors[token] for token in order}  # the library sorts them by name
        places = [s for tower in towers_of(model) for s in tower.sites if isinstance(s, VocabularySite)]
        by_encoder = set(tensors) <= {*ENCODERS, ANY}
        tokens, note = _tokens(file, list(tensors), by_encoder, options)
        rows = _by_encoder(file, tensors, places) if by_encoder else _by_token(file, tensors, places)
        for site, vectors in rows:
            _fit(file, site, vectors, len(tokens))
        config = {"tokens": tokens if len(tokens) > 1 else tokens[0], "vectors": len(rows[0][1]) // len(tokens)}
        state = {f"{site.name}:vectors": vectors for site, vectors in rows}
        sites = [site.name for site, _ in rows]
        each = Wanted("textual_inversion", "textual_inversion", config, sites, state, notes=[note] if note else [])
        return attach_all(model, file, [each], options)

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        target = destination(path, self.file)
        several = listed(attachments)
        if len(several) != 1 or several[0].method.name != "textual_inversion":
            got = ", ".join(f"'{a.name}' ({a.method.name})" for a in several) or "none"
            raise SaveError(f"{target}: the format holds one textual_inversion attachment, got {got}. The native file holds any.")
        attachment = several[0]
        extra = [key for key in attachment.state_dict() if not key.endswith(":vectors")]
        if extra:
            raise SaveError(
                f"{target}: the format has no place for {', '.join(extra[:4])}. The native file (Attachment.save) has."
            )
        method: Any = attachment.method
        names = _encoders(attachment, target)
        vectors: dict[str, Tensor] = {names[site.name]: _rows(adapter) for site, adapter in attachment.parts.values()}
        if len(vectors) == 1:
            only = next(iter(vectors.values()))
            vectors = {t: only[i * method.vectors : (i + 1) * method.vectors] for i, t in enumerate(method.each)}
        metadata = {"format": "pt", TOKENS: json.dumps(list(method.each), ensure_ascii=False)}
        if provenance:
            metadata["provenance"] = json.dumps(dict(provenance))
        return write(target, vectors, metadata)


def _rows(adapter: Any) -> Tensor:
    rows: Tensor = adapter.vectors.detach()
    return rows


def _encoders(attachment: Attachment, target: Path) -> dict[str, str]:
    """Site name to the field's name of its text encoder."""
    free = {"CLIP": ["clip_l", "clip_g"], "T5": ["t5"]}
    names: dict[str, str] = {}
    for site, _ in attachment.parts.values():
        kind = type(attachment.towers[site.component]).__name__
        left = free["T5" if kind.startswith("T5") else "CLIP"]
        if not left:
            raise SaveError(f"{target}: the format has no name for one more {kind}, '{site.component}'.")
        names[site.name] = left.pop(0)
    return names


def _tokens(file: File, keys: list[str], by_encoder: bool, options: Options) -> tuple[list[str], str | None]:
    """The tokens of a file, and a remark where they are not in it."""
    saved = file.json(TOKENS) if by_encoder else keys
    if options.token is not None:
        if isinstance(saved, list) and len(saved) > 1:
            raise LoadError(f"{file.path}: it has {len(saved)} tokens, {', '.join(map(str, saved))}; token= can rename only one.")
        return [options.token], None
    if saved is None:
        token = f"<{file.path.stem.lower()}>"
        return [token], f"no token in the file: '{token}' after its name; token=… gives another"
    if not isinstance(saved, list) or not saved or not all(isinstance(t, str) for t in saved):
        raise LoadError(f"{file.path}: the header's tokens are {saved!r}, not a list of words. Pass token=….")
    return saved, None


def _by_token(file: File, tensors: Mapping[str, Tensor], places: Sequence[VocabularySite]) -> Rows:
    counts = {len(t) for t in tensors.values()}
    if len(counts) > 1:
        found = ", ".join(f"{key} {len(t)}" for key, t in tensors.items())
        raise LoadError(f"{file.path}: its tokens have different numbers of vectors ({found}). Save each to a file of its own.")
    rows = torch.cat(list(tensors.values()))
    return [(_by_width(file, rows.shape[1], places), rows)]


def _by_width(file: File, width: int, places: Sequence[VocabularySite]) -> VocabularySite:
    """The first text encoder of that width."""
    found = next((s for s in places if s.width == width), None)
    if found is None:
        raise LoadError(f"{file.path}: its vectors are {width} wide; {_offer(places)}. It was trained for another base.")
    return found


def _offer(places: Sequence[VocabularySite]) -> str:
    return (
        "the model's text encoders are " + ", ".join(f"{s.component or s.name} {s.width}" for s in places)
        if places
        else ("the model has no text encoder. Load it on a pipeline")
    )


def _by_encoder(file: File, tensors: Mapping[str, Tensor], places: Sequence[VocabularySite]) -> Rows:
    if ANY in tensors:
        if len(tensors) > 1:
            raise LoadError(f"{file.path}: '{ANY}' beside {', '.join(k for k in tensors if k != ANY)}; one of them is too many.")
        return [(_by_width(file, tensors[ANY].shape[1], places), tensors[ANY])]
    t5 = [s for s in places if s.path.startswith("encoder.")]
    clip = [s for s in places if s not in t5]
    offered = {"clip_l": clip[:1], "clip_g": clip[1:2] or clip[:1] * (len(tensors) == 1), "t5": t5[:1], "t5xxl": t5[:1]}
    away = [key for key in tensors if not offered[key]]
    if away:
        raise LoadError(f"{file.path}: it has vectors for {', '.join(away)}; {_offer(places)}. It was made for another pipeline.")
    found = [(offered[key][0], t) for key, t in tensors.items()]
    order = {s.name: i for i, s in enumerate(places)}
    return sorted(found, key=lambda part: order[part[0].name])


def _fit(file: File, site: VocabularySite, vectors: Tensor, tokens: int) -> None:
    if vectors.shape[1] != site.width:
        raise LoadError(
            f"{file.path}: its vectors for '{site.component or site.name}' are {vectors.shape[1]} wide; the text encoder's rows "
            f"are {site.width}. It was trained for another base."
        )
    if not len(vectors) or len(vectors) % tokens:
        raise LoadError(f"{file.path}: {len(vectors)} vectors for {tokens} tokens, which does not come out even. It is damaged.")


save = Embeddings().save
