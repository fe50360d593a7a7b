"""Adapters of other runs that stay fixed while a new one is trained on top of them (`--with`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.formats import load_all, local_path
from veneer.injection import Attachment
from veneer.injection.errors import LoadError, OptionError

from .initial_adapter import file_digest

RECORD = "with"
"""Key of the metadata of a file that lists the adapters it was trained on top of."""
STRENGTHS = "strengths"
"""Key of the metadata of a file with the strengths of its adapters, in their order."""


@dataclass(frozen=True)
class FixedAdapter:
    """An adapter file and its strength.

    Args:
        file: path as given. `scale`: strength. `sha256`: digest of the file.
    """

    file: Path
    scale: float
    sha256: str

    def record(self) -> dict[str, Any]:
        """Entry in the metadata of a file."""
        return {"file": str(self.file), "scale": self.scale, "sha256": self.sha256}

    def argument(self) -> str:
        """FILE, or FILE:STRENGTH."""
        return str(self.file) if self.scale == 1 else f"{self.file}:{self.scale:g}"


def parse_adapter(text: str) -> tuple[Path, float]:
    """Local path and strength from `PATH` or `PATH:strength`; a path that does not exist may be a hub name.

    Raises:
        VeneerError: the path does not exist, or the hub has no such adapter.
    """
    name, scale = split_strength(text)
    place = local_path(name)
    if not place.exists():
        message = (
            f"adapter {text!r}: no such file or folder. Expected PATH or PATH:strength, such as runs/toy-lora:0.8, or a hub name "
            "such as user/toy-lora."
        )
        raise OptionError(message, option="adapter", given=text, file=place)
    return place, scale


def split_strength(text: str) -> tuple[str, float]:
    """Name and strength of `NAME` or `NAME:strength`; an existing path may contain the colon."""
    name, _, number = text.rpartition(":")
    try:
        return (name, float(number)) if name and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def read_fixed(texts: Sequence[str]) -> list[FixedAdapter]:
    """The files and strengths of FILE or FILE:STRENGTH.

    Raises:
        OptionError: a path does not exist. LoadError: it is not an adapter file.
    """
    return [FixedAdapter(path, scale, file_digest(path)) for path, scale in map(parse_adapter, texts)]


def attach_fixed(pipe: Any, adapters: Sequence[FixedAdapter]) -> list[Attachment]:
    """Attaches adapters that do not train, without the heads of classifiers.

    Raises:
        LoadError: one does not match the base model, or has no adapter besides a head.
    """
    attached = [attachment for adapter in adapters for attachment in _load(pipe, adapter)]
    for attachment in attached:
        for parameter in attachment.parameters():
            parameter.requires_grad_(False)
        for _, adapter in attachment.parts.values():
            adapter.eval()
    return attached


def _load(pipe: Any, adapter: FixedAdapter) -> list[Attachment]:
    attached = load_all(pipe, adapter.file, heads=False)
    if not attached:
        message = f"{adapter.file}: has only the head of a classifier, which a run cannot train on top of; leave it out."
        raise LoadError(message, file=adapter.file, where="attachments", given=(), expected="an adapter")
    restore_strengths(attached, adapter.scale)
    return attached


def strengths_of(attached: Sequence[Attachment]) -> dict[str, Any]:
    """Metadata of a file with attachments of which one has another strength than 1, else empty. See `restore_strengths`."""
    strengths = [a.scale for a in attached]
    return {STRENGTHS: strengths} if any(strength != 1 for strength in strengths) else {}


def restore_strengths(loaded: Sequence[Attachment], factor: float = 1.0) -> None:
    """Sets the strengths in the metadata of the file that attachments were loaded from, times a factor.

    Args:
        loaded: all attachments of the file, in order; a head at the end may be missing.
    """
    saved = loaded[0].provenance.get(STRENGTHS) if loaded else None
    for attachment, strength in zip(loaded, saved or [1.0] * len(loaded), strict=False):
        if factor * strength != attachment.scale:
            attachment.scale = factor * strength


def source_identity(init_from: Path | None, fixed: Sequence[FixedAdapter] = ()) -> dict[str, Any]:
    """Content of the initial and the fixed adapters, which a resumed run must share; empty without them."""
    identity: dict[str, Any] = {} if init_from is None else {"init_from": file_digest(init_from)}
    return {**identity, RECORD: [[each.sha256, each.scale] for each in fixed]} if fixed else identity


def provenance_of(fixed: Sequence[FixedAdapter]) -> dict[str, Any]:
    """Metadata of a file that was trained on top of fixed adapters; empty without them."""
    return {RECORD: [each.record() for each in fixed]} if fixed else {}


def missing_adapters(provenance: Mapping[str, Any], paths: Sequence[Path]) -> list[str]:
    """The fixed adapters that a file needs and that are not among others, as FILE or FILE:STRENGTH.

    Args:
        provenance: of the file. `paths`: adapters in use, compared by content.
    """
    records = [each for each in provenance.get(RECORD, ()) if isinstance(each, dict)]
    adapters = [FixedAdapter(Path(str(r.get("file"))), float(r.get("scale", 1.0)), str(r.get("sha256"))) for r in records]
    digests = {file_digest(path) for path in paths} if adapters else set()
    return [each.argument() for each in adapters if each.sha256 not in digests]
