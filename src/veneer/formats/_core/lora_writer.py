"""LoRA written layer by layer, for formats that know the layers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from veneer.injection import Attachment, SaveError
from veneer.injection.towers import Tower, towers_of

from .._names.kohya import Place
from .._names.kohya_fused import Pair, joined
from .lora_config import refuse

Places = Callable[[Tower], Sequence[Place]]


def pairs(attachments: Sequence[Attachment], target: Path, places: Places, files: str) -> Iterator[tuple[str, Pair]]:
    """Name and pair of every layer that attachments touch, by the first of its names.

    Args:
        places: the layers of a tower, as the format calls them. `files`: what the format is called in errors.
    Raises:
        SaveError: something is no LoRA, a weight has no name in the format, or two attachments adapt one; or there is nothing.
    """
    written: set[str] = set()
    for attachment in attachments:
        refuse(attachment, target, files)
        for place, adapters in by_place(attachment, target, places):
            name = place.names[0]
            if name in written:
                message = f"{target}: two attachments adapt '{name}', and the format holds one. Save them to two files."
                raise SaveError(message, file=target, where=name, given=2, expected=1)
            written.add(name)
            yield name, joined(place, adapters)
    if not written:
        raise SaveError(f"{target}: there is no attachment to save.", file=target, given=0, expected=1)


def by_place(attachment: Attachment, target: Path, places: Places) -> list[tuple[Place, dict[str, Any]]]:
    """Each place that an attachment touches, with its adapters by site name."""
    beside = dict.fromkeys(site.component for site in attachment.offered)  # how many text encoders, though not all are adapted
    towers = [dataclasses.replace(t, component=c, components=beside) for c, m in attachment.towers.items() for t in towers_of(m)]
    known = {site.name: place for tower in towers for place in places(tower) for site in place.sites}
    found: dict[tuple[str, ...], tuple[Place, dict[str, Any]]] = {}
    for name, (site, adapter) in attachment.parts.items():
        place = known.get(name)
        if place is None:
            given, why = _why(site, attachment.towers[site.component], bool(known))
            message = f"{target}: '{name}' {why}. Select other sites, or keep to the native file."
            raise SaveError(message, file=target, where=name, given=given)
        found.setdefault(place.names, (place, {}))[1][name] = adapter
    return list(found.values())


def _why(site: Any, tower: nn.Module, others: bool) -> tuple[str, str]:
    """Why a site has no name in the layout: what it is, in one word and as a message."""
    if getattr(site, "kind", None) == "embedding":
        return "embedding", "is an embedding, which the layout has no name for"
    if getattr(site, "groups", 1) != 1:
        return "groups", f"is a convolution in {site.groups} groups, of which each tool has another low-rank form"
    if getattr(site, "fused", False):
        advice = "Select the slices, or unfuse before attaching"
        return "fused", f"is a fused projection, which the layout has only in slices. {advice}"
    name = type(tower).__name__
    return name, f"is part of a {name}, which the layout has no {'such ' if others else ''}names for"
