"""Diffusion transformers: the families with a record here or in another package, from DiT to video models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host
from veneer.injection.sites import Site

from ._describe import SampleInputs, TowerPart
from ._diffusion_transformers import records
from ._diffusion_transformers.record import TransformerRecord
from ._gradient_modes import register_gradient_modes

CORE = ("dit", "pixart", "sd3", "flux", "sana")
"""Small models that have every kind of site and attention between them."""


class DiffusersDiT(Host):
    """Diffusion transformers for images and video, each described by a `TransformerRecord`.

    Depth counts the blocks of all lists in the order of the forward pass; if a model has several lists, `stage` is their label,
    such as `double` or `single`. Branches are written at the output of their module, before the gate of adaptive norms.
    Joint blocks return text and image tokens, so they have no `StreamSite`. Other packages add families by records:
    `veneer.transformer_records`.
    """

    name: ClassVar[str] = "diffusers_dit"
    tower: ClassVar[str] = "dit"
    library: ClassVar[str] = "diffusers"

    def matches(self, model: nn.Module) -> bool:
        return self.record(model) is not None

    def record(self, model: nn.Module) -> TransformerRecord | None:
        """The record of a model's family: of its class, or of the nearest base class that has one."""
        known = {(record.top_package, name): record for record in records().values() for name in record.classes}
        bases = ((base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__)
        return next((known[base] for base in bases if base in known), None)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        if (record := self.record(model)) is not None:
            yield from record.sites(TowerPart(model, self.tower, component))

    def sample(self, model: nn.Module) -> dict[str, Any]:
        record = self.record(model)
        return record.sample(SampleInputs(model), model) if record is not None else {}

    def gradient_hooks(self, model: nn.Module) -> list[Any]:
        record = self.record(model)
        return register_gradient_modes(model, record.gradient_modes) if record is not None and record.gradient_modes else []

    def float32_modules(self, model: nn.Module) -> tuple[str, ...]:
        record = self.record(model)
        return record.float32 if record is not None else ()

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        every = ((record, key, config) for record in records().values() for key, config in record.tiny.items())
        return {key: functools.partial(record.build, **config) for record, key, config in every}

    def core(self) -> tuple[str, ...]:
        return CORE
