"""Summary of a file without a model, and its compatibility with a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from veneer.injection import VeneerError
from veneer.injection.towers import cache_towers

from .._io.mapped_tensors import release_pages
from .._io.reader import File, read
from .families import family_of
from .format import LayerInfo, Options, format_of

BLOCK = re.compile(r".*?(?:blocks|layers|block)(?:[._]\d+)?(?=[._]|$)")


@dataclass(frozen=True)
class BlockSummary:
    """The layers of one block adapted by one method: count, ranks, alphas and number of stored parameters."""

    name: str
    method: str
    layers: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    values: int


@dataclass(frozen=True)
class FileSummary:
    """Summary of a file.

    Args:
        path, size: location and number of bytes. `tensors`: number of tensors.
        format: its name, or None if unknown. `family`: of base models, if widths or names identify it.
        header: keys of its metadata. `blocks`: adapted blocks. `words`: trigger tokens from its training.
        fits: True if it loads completely on the given model; None without a model.
        used, unused, missing, misshapen: tensors, for that model. `notes`: remarks, such as why it does not load.
    """

    path: Path
    size: int
    tensors: int
    format: str | None
    family: str | None
    header: tuple[str, ...]
    blocks: tuple[BlockSummary, ...]
    words: tuple[str, ...] = ()
    fits: bool | None = None
    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The summary as one JSON object."""
        return json.dumps({**dataclasses.asdict(self), "path": str(self.path)}, ensure_ascii=False, indent=1)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.size:,} bytes, {self.tensors} tensors"]
        lines += [f"format: {self.format or 'unknown'}; family: {self.family or 'unknown'}"]
        lines += [f"trigger tokens: {', '.join(self.words)}"] if self.words else []
        table = [("block", "method", "layers", "rank", "alpha", "parameters")]
        table += [
            (b.name, b.method, str(b.layers), _format_range(b.ranks), _format_range(b.alphas), f"{b.values:,}")
            for b in self.blocks
        ]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        if self.fits is not None:
            lines.append(f"on this base: {'compatible' if self.fits else 'incompatible'}, {len(self.used)} tensors used")
        for word in ("unused", "missing", "misshapen"):
            names: Sequence[str] = getattr(self, word)
            lines += [f"{word}: {len(names)}", *(f"  {name}" for name in names)] if names else []
        return "\n".join([*lines, *self.notes])


def inspect(path: str | PathLike[str], model: Any = None) -> FileSummary:
    """Summarizes a file of any format.

    Args:
        model: a pipeline or model to try it on; unchanged afterwards.
    Raises:
        LoadError: it is not a complete safetensors file.
    """
    file = read(path)
    known = format_of(file)
    layers = known.layers(file) if known else []
    found = FileSummary(
        path=file.path,
        size=file.path.stat().st_size,
        tensors=len(file.shapes),
        format=known.name if known else None,
        family=family_of(file.shapes, known.name if known else None),
        header=tuple(file.metadata),
        blocks=tuple(blocks(layers)),
        words=tuple(known.words(file)) if known else (),
    )
    return found if model is None or known is None else dataclasses.replace(found, **_check_model(model, file, known))


def _check_model(model: Any, file: File, known: Any) -> dict[str, Any]:
    """Loads the file on the model, detaches it, and reports the result."""
    try:
        with release_pages(), cache_towers():
            attached = known.load(model, file, Options(strict=False, same_base=False, assign=True))
    except VeneerError as error:
        return {"fits": False, "notes": (str(error),)}
    reports = [a.loaded for a in attached]
    for attachment in reversed(attached):
        attachment.detach()
    words = ("used", "unused", "missing", "misshapen", "notes")
    tensors = {word: tuple(dict.fromkeys(name for r in reports for name in getattr(r, word))) for word in words}
    return {**tensors, "fits": all(r.clean for r in reports)}


def blocks(layers: Sequence[LayerInfo]) -> list[BlockSummary]:
    """Groups layers by block and method, in the order of the file."""
    found: dict[tuple[str, str], list[LayerInfo]] = {}
    for layer in layers:
        found.setdefault((_block(layer.name), layer.method), []).append(layer)
    return [
        BlockSummary(
            name,
            method,
            len(group),
            tuple(sorted({layer.rank for layer in group if layer.rank is not None})),
            tuple(sorted({float(layer.alpha) for layer in group if layer.alpha is not None and abs(layer.alpha) < math.inf})),
            sum(layer.values for layer in group),
        )
        for (name, method), group in sorted(found.items(), key=lambda item: _natural_key(item[0][0]))
    ]


def _block(name: str) -> str:
    match = BLOCK.match(name)
    return match[0] if match else name.partition(":")[0]


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _format_range(values: Sequence[float]) -> str:
    texts = [f"{value:.4g}" for value in values]
    return "" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]}–{texts[-1]}"
