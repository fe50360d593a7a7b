"""Writes LoRA layer by layer, for formats that identify layers by name."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.injection import Attachment, SaveError
from veneer.injection.towers import Tower, towers_of

from .._io.mapped_tensors import count_use
from .._names.kohya import NamedLayer
from .._names.kohya_fused import LoRAFactors, merge_adapters
from .lora_config import reject_other_methods

LayerNames = Callable[[Tower], Sequence[NamedLayer]]
Layer = tuple[NamedLayer, Mapping[str, Any]]
"""A layer and its adapters by site name."""


class LayerTensors(Mapping[str, Tensor]):
    """The tensors of all layers of a file by key. Fused layers are computed when they are read; only the last one is held.

    Args:
        layers: by primary name. `tensors`: the tensors of a layer by key suffix, the same suffixes for all.
        others: further tensors of the file.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        tensors: Callable[[LoRAFactors], Mapping[str, Tensor]],
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layers, self.tensors, self.others = layers, tensors, dict(others or {})
        self._last: tuple[str, Mapping[str, Tensor]] = ("", {})
        self._keys = {f"{name}.{end}": (name, end) for name in layers for end in self._read(next(iter(layers)))}

    def __getitem__(self, key: str) -> Tensor:
        if key in self.others:
            return self.others[key]
        name, end = self._keys[key]
        return self._read(name)[end]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self.others, self._keys)

    def __len__(self) -> int:
        return len(self.others) + len(self._keys)

    def _read(self, name: str) -> Mapping[str, Tensor]:
        if self._last[0] != name:
            self._last = (name, self.tensors(merge_adapters(*self.layers[name])))
            count_use(*self._last[1].values())
        return self._last[1]


def layers_to_write(attachments: Sequence[Attachment], target: Path, places: LayerNames, files: str) -> dict[str, Layer]:
    """Every layer that the attachments adapt, by primary name.

    Args:
        places: the layers of a tower under the format's names. `files`: plural name of the format's files, for errors.
    Raises:
        SaveError: an adapter is not a LoRA, a weight has no name in the format, two attachments adapt one weight, or there
            is nothing to save.
    """
    found: dict[str, Layer] = {}
    for attachment in attachments:
        reject_other_methods(attachment, target, files)
        for place, adapters in adapters_by_layer(attachment, target, places):
            name = place.names[0]
            if name in found:
                message = f"{target}: two attachments adapt '{name}', but the format holds one. Save them to separate files."
                raise SaveError(message, file=target, where=name, given=2, expected=1)
            found[name] = place, adapters
    if not found:
        raise SaveError(f"{target}: no attachment to save.", file=target, given=0, expected=1)
    return found


def adapters_by_layer(attachment: Attachment, target: Path, places: LayerNames) -> list[tuple[NamedLayer, dict[str, Any]]]:
    """Each layer that an attachment adapts, with its adapters by site name."""
    beside = dict.fromkeys(site.component for site in attachment.supported_sites)  # all text encoders, adapted or not
    towers = [dataclasses.replace(t, component=c, components=beside) for c, m in attachment.towers.items() for t in towers_of(m)]
    known = {site.name: place for tower in towers for place in places(tower) for site in place.sites}
    found: dict[tuple[tuple[str, ...], str], tuple[NamedLayer, dict[str, Any]]] = {}
    for name, (site, adapter) in attachment.parts.items():
        place = known.get(name)
        if place is None:
            kind, why = _explain(site, attachment.towers[site.component], bool(known))
            message = f"{target}: '{name}' {why}. Select other sites, or use the native format."
            raise SaveError(message, file=target, where=name, given=kind)
        found.setdefault((place.names, place.sites[0].name), (place, {}))[1][name] = adapter
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
