"""What the models of timm have in common: the picture they take, and layers and norms that are told apart by their modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from veneer.injection.sites import PixelSite, Port, Site

from ._describe import LAYERS, Part, is_norm, own_parameters


def pixels(part: Part, side: tuple[int, ...] | None = None) -> PixelSite:
    """The picture of a model of timm; `side`: (height, width) where it is fixed, else its configuration's."""
    model: Any = part.model
    config = getattr(model, "pretrained_cfg", None) or {}
    size = (*(side or config.get("input_size", (3, 224, 224))[1:]), model.in_chans)
    mean, std = (tuple(config.get(key, (0.5,) * 3)) for key in ("mean", "std"))
    return PixelSite(name="pixels", role="pixels", port=Port("", "in"), size=size, mean=mean, std=std, **part.labels)


def head(part: Part, path: str, width: int) -> Iterator[Site]:
    """Features on their way into the classifier at `path`, logits, and the classifier's layer; nothing where there is none."""
    if part.module(path) is not None:
        yield from part.features(path, width)
        yield from part.layer(path, "head")


def walk(
    part: Part, path: str, roles: Mapping[str, str] = MappingProxyType({}), default: str = "", besides: tuple[str, ...] = ()
) -> Iterator[Site]:
    """Every layer, norm and free parameter at and below `path`, in the order of registration.

    Args:
        roles: name of a layer (below `path`) to its role; others get `default`, or what their geometry says.
        besides: names that are left out.
    """
    for at, module in part.leaves(path):
        name = at.removeprefix(path).removeprefix(".")
        if name in besides:
            continue
        if isinstance(module, LAYERS):
            yield from part.layer(at, roles.get(name) or default or conv_role(module))
            continue
        norm = is_norm(module)
        yield from part.norm(at) if norm else ()
        for param in own_parameters(module):
            if not norm or param not in ("weight", "bias"):
                yield part.free(at, param, "scale" if param == "gamma" else "other")


def conv_role(module: nn.Module) -> str:
    """`conv.dw`: a kernel a channel; `conv.pw`: one pixel, all channels, as of a linear layer; `conv.res`: all others."""
    if not isinstance(module, nn.Conv2d):
        return "conv.pw"
    if module.groups > 1 and module.groups == module.in_channels:
        return "conv.dw"
    return "conv.pw" if math.prod(module.kernel_size) == 1 and module.groups == 1 else "conv.res"
