"""Time and floating-point operations of conditional adapters, which run the blocks of an image model on some tokens only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from veneer.injection import attach

from .interleaved_timing import Contender, Contest
from .shapes import Shape, place, sharing, vit
from .side_networks import step

REFERENCE = "adaptformer"
RATIOS = (0.5, 0.25)
"""Shares of the tokens that run the blocks."""


def contests(shape: Shape, bottleneck: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Contests of a forward pass and of a training step, each relative to the same bottleneck beside whole blocks.

    Args:
        bottleneck: width of the adapters. `dtype`: of the base; adapters are float32.
    """
    base = vit(shape.base_vit, dtype, seed)
    side = base.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape.few_images, 3, side, side, generator=generator).to(place(), dtype)
    labels = torch.randint(base.num_classes, (shape.few_images,), generator=generator).to(place())
    contenders = models(base, bottleneck)
    what = f"{shape.base_vit}, batch {shape.few_images}, bottleneck {bottleneck}, {str(dtype).removeprefix('torch.')}"
    counts = ", ".join(f"{name} {flops(model, images) / 1e9:.2f}" for name, model in contenders.items())
    pairs = tuple((name, REFERENCE) for name in contenders if name != REFERENCE)
    passes = tuple(Contender(name, forward(model, images)) for name, model in contenders.items())
    steps = tuple(Contender(name, step(model, images, labels)) for name, model in contenders.items())
    return [
        Contest("conditional adapters, forward pass", f"{what}; GFLOP: {counts}", passes, pairs),
        Contest("conditional adapters, step", f"forward, loss, backward, SGD on {what}", steps, pairs),
    ]


def models(base: nn.Module, bottleneck: int) -> dict[str, nn.Module]:
    """A copy of the base for each contender, with the base's tensors."""
    contenders: dict[str, nn.Module] = {REFERENCE: sharing(base)}
    attach(contenders[REFERENCE], "adaptformer", bottleneck=bottleneck)
    for ratio in RATIOS:
        model = contenders[f"coda {ratio}"] = sharing(base)
        attach(model, "coda", ratio=ratio, bottleneck=bottleneck)
    return contenders


def forward(model: nn.Module, images: torch.Tensor) -> Callable[[Any], object]:
    """A function that runs one forward pass without gradients."""

    def run(_: Any) -> object:
        with torch.inference_mode():
            return model(images)

    return run


def flops(model: nn.Module, images: torch.Tensor) -> int:
    """Floating-point operations of matrix products and attention in a forward pass; a multiplication with an addition is two."""
    in_place = {torch.ops.aten.addmm_: _addmm}
    # the fused attention of CPUs is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        forward(model, images)(None)
    return int(counter.get_total_flops())


def _addmm(sum_shape: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])
