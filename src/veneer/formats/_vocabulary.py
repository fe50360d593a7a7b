"""Learned words and the text encoders that they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..injection import Attachment, LoadError, SaveError
from ..injection.sites import VocabularySite
from ._reading import File

ANY = "emb_params"  # sd-scripts: one tensor, no token
Rows = list[tuple[VocabularySite, Tensor]]
ENCODERS = {"clip_l": "CLIP", "clip_g": "CLIP", "t5": "T5", "t5xxl": "T5"}


def encoders(attachment: Attachment, target: Path) -> dict[str, str]:
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


def by_width(file: File, width: int, places: Sequence[VocabularySite]) -> VocabularySite:
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


def by_encoder(file: File, tensors: Mapping[str, Tensor], places: Sequence[VocabularySite]) -> Rows:
    wrong = next((key for key, t in tensors.items() if t.ndim != 2), None)
    if wrong is not None:
        raise LoadError(f"{file.path}: '{wrong}' is {tuple(tensors[wrong].shape)}; expected vectors (n, width). It is damaged.")
    if ANY in tensors:
        if len(tensors) > 1:
            raise LoadError(f"{file.path}: '{ANY}' beside {', '.join(k for k in tensors if k != ANY)}; one of them is too many.")
        return [(by_width(file, tensors[ANY].shape[1], places), tensors[ANY])]
    t5 = [s for s in places if s.path.startswith("encoder.")]
    clip = [s for s in places if s not in t5]
    offered = {"clip_l": clip[:1], "clip_g": clip[1:2] or clip[:1] * (len(tensors) == 1), "t5": t5[:1], "t5xxl": t5[:1]}
    away = [key for key in tensors if not offered[key]]
    if away:
        raise LoadError(f"{file.path}: it has vectors for {', '.join(away)}; {_offer(places)}. It was made for another pipeline.")
    found = [(offered[key][0], t) for key, t in tensors.items()]
    order = {s.name: i for i, s in enumerate(places)}
    return sorted(found, key=lambda part: order[part[0].name])


def fit(file: File, site: VocabularySite, vectors: Tensor, tokens: int) -> None:
    if vectors.shape[1] != site.width:
        raise LoadError(
            f"{file.path}: its vectors for '{site.component or site.name}' are {vectors.shape[1]} wide; the text encoder's rows "
            f"are {site.width}. It was trained for another base."
        )
    if not len(vectors) or len(vectors) % tokens:
        raise LoadError(f"{file.path}: {len(vectors)} vectors for {tokens} tokens, which does not come out even. It is damaged.")
