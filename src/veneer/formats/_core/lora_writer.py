"""Writes LoRA layer by layer, for formats that identify layers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from veneer.injection import Attachment, SaveError
from veneer.injection.towers import Tower, towers_of

from .._names.kohya import NamedLayer
from .._names.kohya_fused import LoRAFactors, merge_adapters
from .lora_config import reject_other_methods

LayerNames = Callable[[Tower], Sequence[NamedLayer]]


def layer_factors(
    attachments: Sequence[Attachment], target: Path, places: LayerNames, files: str
) -> Iterator[tuple[str, LoRAFactors]]:
    """Primary name and factors of every layer that the attachments adapt.

    Args:
        places: the layers of a tower under the format's names. `files`: plural name of the format's files, for errors.
    Raises:
        SaveError: an adapter is not a LoRA, a weight has no name in the format, two attachments adapt one weight, or there
            is nothing to save.
    """
    written: set[str] = set()
    for attachment in attachments:
        reject_other_methods(attachment, target, files)
        for place, adapters in adapters_by_layer(attachment, target, places):
            name = place.names[0]
            if name in written:
                message = f"{target}: two attachments adapt '{name}', but the format holds one. Save them to separate files."
                raise SaveError(message, file=target, where=name, given=2, expected=1)
            written.add(name)
            yield name, merge_adapters(place, adapters)
    if not written:
        raise SaveError(f"{target}: no attachment to save.", file=target, given=0, expected=1)


def adapters_by_layer(attachment: Attachment, target: Path, places: LayerNames) -> list[tuple[NamedLayer, dict[str, Any]]]:
    """Each layer that an attachment adapts, with its adapters by site name."""
    beside = dict.fromkeys(site.component for site in attachment.supported_sites)  # all text encoders, adapted or not
    towers = [dataclasses.replace(t, component=c, components=beside) for c, m in attachment.towers.items() for t in towers_of(m)]
    known = {site.name: place for tower in towers for place in places(tower) for site in place.sites}
    found: dict[tuple[str, ...], tuple[NamedLayer, dict[str, Any]]] = {}
    for name, (site, adapter) in attachment.parts.items():
        place = known.get(name)
        if place is None:
            kind, why = _explain(site, attachment.towers[site.component], bool(known))
            message = f"{target}: '{name}' {why}. Select other sites, or use the native format."
            raise SaveError(message, file=target, where=name, given=kind)
        found.setdefault(place.names, (place, {}))[1][name] = adapter
    return list(found.values())


def _explain(site: Any, tower: nn.Module, others: bool) -> tuple[str, str]:
    """Why the format has no name for a site: one word, and a phrase for the message."""
    if getattr(site, "kind", None) == "embedding":
        return "embedding", "is an embedding, which has no name in this format"
    if getattr(site, "groups", 1) != 1:
        return "groups", f"is a convolution with {site.groups} groups, for which tools use different low-rank forms"
    if getattr(site, "fused", False):
        advice = "Select its slices, or unfuse before attaching"
        return "fused", f"is a fused projection, which this format stores as slices. {advice}"
    name = type(tower).__name__
    return name, f"is part of a {name}, for which the format has no {'such ' if others else ''}names"
