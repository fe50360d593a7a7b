"""Converts an adapter file to another format through a model; writes nothing unless every ΔW is preserved."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from veneer.injection import Attachment, SaveError
from veneer.injection.towers import cache_towers

from .._io.mapped_tensors import release_pages
from .._io.reader import File, read
from .delta_comparison import TEXTUAL_INVERSION, compare
from .format import Format, Options, formats, known_format
from .token_embeddings import attach_tokens, token_embeddings, token_files

TOKEN_FORMATS = ("native", "embeddings", "onetrainer")  # formats that can hold token embeddings


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion: files, weights compared, largest difference relative to the largest ΔW, and notes on omissions."""

    files: tuple[Path, ...]
    weights: int
    difference: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        summary = f"{self.weights} weight updates are equal (largest difference {self.difference:.1e} of ΔW)"
        return "\n".join([*map(str, self.files), summary, *self.notes])


def convert(
    model: Any, path: str | PathLike[str], to: str, out: str | PathLike[str], provenance: Mapping[str, Any] | None = None
) -> ConversionResult:
    """Converts a file to another format, loads the result, and compares the two weight updates at every weight.

    Token embeddings, which LoRA formats cannot hold, are written to separate files, one per token and named after it: A1111,
    Forge and ComfyUI use the file name as the trigger.

    Args:
        model: the pipeline or model that the file is for; unchanged afterwards.
        to: name of the target format. `out`: the new file or folder. `provenance`: stored in it.
    Raises:
        LoadError: the file is incompatible with the model.
        SaveError: the format cannot hold the adapter, a weight update would differ, or `out` exists.
    """
    with release_pages():
        return _convert(model, read(path), to, out, provenance)


def _convert(model: Any, file: File, to: str, out: str | PathLike[str], provenance: Mapping[str, Any] | None) -> ConversionResult:
    target, known = formats.get(to)(), known_format(file)
    final, half = target.place(out), _half_precision(file)
    with cache_towers():
        attached = known.load(model, file, Options(assign=half is not None))
    try:
        tokens = [] if to in TOKEN_FORMATS else _split_tokens(model, attached)
        jobs = {final: (target, [a for a in attached if a not in tokens])}
        _reject_existing([final, *(final.with_name(name) for name in target.beside)])
        places = token_files(final, [each for a in tokens for each in token_embeddings(a)]).values()
        jobs |= {place: (formats.get("embeddings")(), [a]) for place, a in zip(places, tokens, strict=True)}
        _restore_precision(attached, half)
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=final.parent) as folder:
            temporary_files = {
                place: file_format.save(group, Path(folder) / f"{i}" / place.name, provenance)
                for i, (place, (file_format, group)) in enumerate(jobs.items())
                if group
            }
            for attachment in reversed(attached):
                attachment.detach()
            before, attached = attached, []
            for place, (file_format, group) in jobs.items():
                if group:
                    options = Options(same_base=False, assign=half is not None)
                    with cache_towers():
                        attached += file_format.load(model, read(temporary_files[place]), options)
            weights, difference = compare(before, attached, final)
            for place, temporary_file in temporary_files.items():
                place.parent.mkdir(exist_ok=True)
                os.replace(temporary_file.parent if jobs[place][0].folder else temporary_file, place)
            extra_files = [final.with_name(name) for name in target.beside if (Path(folder) / "0" / name).exists()]
            for place in extra_files:
                os.replace(Path(folder) / "0" / place.name, place)
    finally:
        for attachment in reversed(attached):
            attachment.detach()
    return ConversionResult((*temporary_files, *extra_files), weights, difference, tuple(_notes(file, known, to, list(places))))


def _split_tokens(model: Any, attached: list[Attachment]) -> list[Attachment]:
    """The textual-inversion attachments in `attached`, after splitting there those that hold several tokens."""
    attachments = []
    for attachment in [a for a in attached if a.method.name == TEXTUAL_INVERSION]:
        singles = [attachment]
        if len(embeddings := token_embeddings(attachment)) > 1:
            index = attached.index(attachment)
            attached.pop(index).detach()
            singles = attach_tokens(model, embeddings)
            attached[index:index] = singles
        attachments += singles
    return attachments


def _half_precision(file: File) -> torch.dtype | None:
    """The dtype of a file whose floating-point tensors, except scalars, are all in the same half precision."""
    kinds = {t.dtype for t in file.tensors(finite=False).values() if t.is_floating_point() and t.ndim}
    return kind if len(kinds) == 1 and (kind := next(iter(kinds))).itemsize == 2 else None


def _restore_precision(attachments: Sequence[Attachment], half: torch.dtype | None) -> None:
    """Casts adapter parameters to the file's half precision where this is lossless. Base parameters are not cast."""
    for parameter in (p for a in attachments for _, adapter in a.parts.values() for p in adapter.parameters()) if half else ():
        if parameter.dtype != half and torch.equal(parameter.to(half).to(parameter.dtype), parameter):
            parameter.data = parameter.data.to(half)


def _reject_existing(places: Sequence[Path]) -> None:
    for place in places:
        if place.exists():
            raise SaveError(f"{place}: already exists. Give another --out.", file=place, given="exists")


def _notes(file: File, known: Format, to: str, tokens: Sequence[Path]) -> list[str]:
    """Remarks on what the new file does not contain."""
    notes = [f"token embedding in {path.name}: its trigger in A1111 and ComfyUI is {path.stem}" for path in tokens]
    if known.name != to and file.metadata:
        keys = [key for key in file.metadata if key != "format"]
        names = ", ".join(keys[:4]) + (" …" if len(keys) > 4 else "")
        notes += [f"not copied: {len(keys)} metadata entries ({names})"] if keys else []
    return notes
