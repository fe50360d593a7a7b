"""Parts shared by the hosts of timm: image input, and layers and norms classified by their modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from veneer.injection.sites import PixelSite, Port, Site

from ._describe import LAYERS, TowerPart, is_norm, own_parameters


def pixels(part: TowerPart, side: tuple[int, ...] | None = None) -> PixelSite:
    """The image input of a timm model; `side`: (height, width) if fixed, else from its configuration."""
    model: Any = part.model
    config = getattr(model, "pretrained_cfg", None) or {}
    size = (*(side or config.get("input_size", (3, 224, 224))[1:]), model.in_chans)
    mean, std = (tuple(config.get(key, (0.5,) * 3)) for key in ("mean", "std"))
    return PixelSite(name="pixels", role="pixels", port=Port("", "in"), size=size, mean=mean, std=std, **part.labels)


def head(part: TowerPart, path: str, width: int) -> Iterator[Site]:
    """Features that enter the classifier at `path`, logits, and the classifier's layer; empty without a classifier."""
    if part.module(path) is not None:
        yield from part.features(path, width)
        yield from part.layer(path, "head")


def walk(
    part: TowerPart, path: str, roles: Mapping[str, str] = MappingProxyType({}), default: str = "", besides: tuple[str, ...] = ()
) -> Iterator[Site]:
    """Every layer, norm and free parameter at and below `path`, in registration order.

    Args:
        roles: name of a layer (below `path`) -> its role; others get `default`, or a role by geometry.
        besides: names to skip.
    """
    for at, module in part.modules_with_parameters(path):
        name = at.removeprefix(path).removeprefix(".")
        if name in besides:
            continue
        if isinstance(module, LAYERS):
            yield from part.layer(at, roles.get(name) or default or layer_role(module))
            continue
        norm = is_norm(module)
        yield from part.norm(at) if norm else ()
        for param in own_parameters(module):
            if not norm or param not in ("weight", "bias"):
                yield part.parameter(at, param, "scale" if param == "gamma" else "other")


def layer_role(module: nn.Module) -> str:
    """`conv.dw`: depthwise; `conv.pw`: pointwise, 1×1 over all channels; `conv.res`: all others."""
    if not isinstance(module, nn.Conv2d):
        return "conv.pw"
    if module.groups > 1 and module.groups == module.in_channels:
        return "conv.dw"
    return "conv.pw" if math.prod(module.kernel_size) == 1 and module.groups == 1 else "conv.res"
