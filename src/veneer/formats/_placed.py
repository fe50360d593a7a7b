"""LoRA written layer by layer, for formats that know the layers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..injection import Attachment, SaveError
from ..injection.towers import Tower, towers_of
from ._kohya_fused import Pair, joined
from ._kohya_names import Place
from ._lora import refuse

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
                raise SaveError(f"{target}: two attachments adapt '{name}', and the format holds one. Save them to two files.")
            written.add(name)
            yield name, joined(place, adapters)
    if not written:
        raise SaveError(f"{target}: there is no attachment to save.")


def by_place(attachment: Attachment, target: Path, places: Places) -> list[tuple[Place, dict[str, Any]]]:
    """Each place that an attachment touches, with its adapters by site name."""
    beside = dict.fromkeys(site.component for site in attachment.offered)  # how many text encoders, though not all are adapted
    towers = [dataclasses.replace(t, component=c, components=beside) for c, m in attachment.towers.items() for t in towers_of(m)]
    known = {site.name: place for tower in towers for place in places(tower) for site in place.sites}
    found: dict[tuple[str, ...], tuple[Place, dict[str, Any]]] = {}
    for name, (site, adapter) in attachment.parts.items():
        place = known.get(name)
        if place is None:
            why = _why(site, attachment.towers[site.component], bool(known))
            raise SaveError(f"{target}: '{name}' {why}. Select other sites, or keep to the native file.")
        found.setdefault(place.names, (place, {}))[1][name] = adapter
    return list(found.values())


def _why(site: Any, tower: nn.Module, others: bool) -> str:
    """Why a site has no name in the layout."""
    if getattr(site, "kind", None) == "embedding":
        return "is an embedding, which the layout has no name for"
    if getattr(site, "groups", 1) != 1:
        return f"is a convolution in {site.groups} groups, of which each tool has another low-rank form"
    if getattr(site, "fused", False):
        return "is a fused projection, which the layout has only in slices. Select the slices, or unfuse before attaching"
    return f"is part of a {type(tower).__name__}, which the layout has no {'such ' if others else ''}names for"
