"""Every timm model that no other host matches: layers, norms, parameters, image input and head, without blocks' internals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.sites import PixelSite, Port, Site

from ._describe import SampleInputs, TowerPart
from ._timm_fallback import tiny
from ._timm_fallback.meta_forward import Size, meta_forward
from ._timm_fallback.module_sites import layer_sites

PACKAGE = "timm.models."
WRAPPERS = "timm.models._features"  # models that return feature maps


class TimmFallback(Host):
    """Any other model of timm, described by one forward pass of a copy on the meta device.

    Weights of linear layers and convolutions, norms, biases, all other parameters, the image input and the head. Depth counts
    the groups of layers by which timm scales learning rates. A weight is `called` if its module is, and computes a plain
    product or convolution; it is `inert` if the output does not depend on it. There are no branches, streams and tokens:
    methods that need them are rejected. Weights of an LSTM, and attention biases that a
    module caches in evaluation mode, have no sites.
    """

    name: ClassVar[str] = "timm_fallback"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "timm"
    fallback: ClassVar[bool] = True

    def matches(self, model: nn.Module) -> bool:
        names = module_names(model)
        whole = hasattr(model, "pretrained_cfg") or hasattr(model, "get_classifier")
        return whole and any(n.startswith(PACKAGE) for n in names) and not any(n.startswith(WRAPPERS) for n in names)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        part = TowerPart(model, self.tower, component)
        size, config = image_size(model), getattr(model, "pretrained_cfg", None) or {}
        mean, std = (tuple(config.get(key, (0.5,) * 3)) for key in ("mean", "std"))
        channels, height, width = size
        pixels = PixelSite(
            name="pixels", role="pixels", port=Port("", "in"), size=(height, width, channels), mean=mean, std=std, **part.labels
        )
        yield pixels
        yield from layer_sites(part, meta_forward(model, size))

    def sample(self, model: nn.Module) -> dict[str, Any]:
        return {"x": SampleInputs(model).normal(2, *image_size(model))}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return dict(tiny.BUILDERS)

    def core(self) -> tuple[str, ...]:
        return tiny.CORE


def image_size(model: Any) -> Size:
    """Channels, height and width of a model's images: its own size if that is fixed, else the one of its configuration."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *side = config.get("input_size", (3, 224, 224))
    embed = getattr(model, "patch_embed", None)
    fixed = getattr(embed, "img_size", None) or getattr(model, "img_size", None)
    if fixed:
        side = [fixed, fixed] if isinstance(fixed, int) else list(fixed)
    return (getattr(model, "in_chans", None) or channels, side[0], side[1])
