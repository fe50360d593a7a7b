"""LoRA of some slices of a fused layer as one LoRA of the layer, for models whose only layer is the fused one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

from veneer.injection import Attachment
from veneer.injection.sites import WeightSite

from .._names.kohya import NamedLayer
from .._names.kohya_fused import LoRAFactors, merge_adapters
from .._names.modules import is_always_fused, slices_by_layer


class FusedLoRA(NamedTuple):
    """A fused layer's component, path and factors: block-diagonal, with the sum of the slices' ranks."""

    component: str
    path: str
    factors: LoRAFactors


def is_slice(site: Any) -> TypeGuard[WeightSite]:
    """True for rows of a linear layer that the model always fuses, such as `to_q` in the single-stream blocks of FLUX.2."""
    return isinstance(site, WeightSite) and site.kind == "linear" and site.rows is not None and is_always_fused(site)


def merge_slices(attachment: Attachment) -> Iterator[FusedLoRA]:
    """Each fused layer with adapted slices. The whole weight update is equal: the rows of other slices are zero."""
    layers: dict[tuple[str, str], dict[str, Any]] = {}
    for site, adapter in attachment.parts.values():
        if is_slice(site):
            layers.setdefault((site.component, site.path), {})[site.name] = adapter
    slices = slices_by_layer(attachment.supported_sites)
    for (component, path), adapters in layers.items():
        yield FusedLoRA(component, path, merge_adapters(NamedLayer((path,), slices[component, path]), adapters))
