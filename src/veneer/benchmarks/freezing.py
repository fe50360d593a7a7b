"""Time and memory of a training step of `autofreeze` on an image model, by the number of frozen blocks, against `full`.

The backward pass ends at the first trained block, and activations before it are not saved. Each step is forward, loss,
backward and SGD without momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from veneer.injection import Attachment, attach
from veneer.injection.errors import OptionError

from .interleaved_timing import Contender, Contest
from .shapes import Shape, place, vit
from .side_networks import step

PARTS = {"autofreeze, none": 0.0, "autofreeze, half": 0.5, "autofreeze, three quarters": 0.75}
"""Contender -> the part of the blocks that is frozen."""


def contests(shape: Shape, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Contests of time and peak memory of a step, each relative to `full`.

    Args:
        dtype: of the base; trained tensors are float32.
    """
    base = vit(shape.base_vit, dtype, seed)
    side = base.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape.few_images, 3, side, side, generator=generator).to(place(), dtype)
    labels = torch.randint(base.num_classes, (shape.few_images,), generator=generator).to(place())
    ways = tuple(Contender(name, run) for name, run in steps(base, images, labels).items())
    pairs = tuple((way.name, "full") for way in ways if way.name != "full")
    what = f"{shape.base_vit}, batch {shape.few_images}, {str(dtype).removeprefix('torch.')}"
    return [
        Contest("freezing, step", f"forward, loss, backward, SGD on {what}, with part of the blocks frozen", ways, pairs),
        Contest("freezing, peak memory of a step", what, ways, pairs, unit="MB"),
    ]


def steps(base: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[Any], float]]:
    """A training step of `full`, and of `autofreeze` with each part of the blocks frozen."""
    model = copy.deepcopy(base)
    attach(model, "full")
    runs = {"full": step(model, images, labels)}
    for name, part in PARTS.items():
        model = copy.deepcopy(base)
        attachment = attach(model, "autofreeze")
        freeze(attachment, part)
        runs[name] = step(model, images, labels)
    return runs


def freeze(attachment: Attachment, part: float) -> None:
    """Freezes the first `part` of the blocks, and what precedes them, as the schedule of a run does.

    Raises:
        OptionError: the model has no blocks.
    """
    depths = {site.depth for site, _ in attachment.parts.values() if site.depth is not None}
    if not depths:
        raise OptionError("freezing: the model has no blocks", option="model", method="freezing", given=0, expected=1)
    first = round(part * (max(depths) + 1))
    is_leading = True
    for site, adapter in attachment.parts.values():
        is_leading = is_leading and site.depth is None
        if first and (is_leading or (site.depth is not None and site.depth < first)):
            adapter.get_buffer("frozen").fill_(True)
    attachment.begin_pass(0, 0)
