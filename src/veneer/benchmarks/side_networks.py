"""Memory and time of a training step on an image model: side networks, LoRA, a linear probe and full fine-tuning.

The peak memory of a step is mostly activations saved for the backward pass. A linear probe saves none, LST one tensor per block
for its own matrices, DTL also the activations of all blocks after its first write, LoRA those of every block, and full
fine-tuning has gradients of the whole model too. Each step is forward, loss, backward and SGD without momentum, so that there
is no optimizer state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from veneer.injection import attach

from .interleaved_timing import Contender, Contest
from .shapes import Shape, place, sharing, vit

METHODS: dict[str, dict[str, Any]] = {"lora": {"where": "attn.qkv"}, "lst": {}, "dtl": {}}
"""Options of each method; LoRA's rank is a setting of the benchmark."""


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Contests of peak memory and time of a step, each relative to LoRA.

    Args:
        rank: of LoRA. `dtype`: of the base; adapters are float32.
    """
    base = vit(shape.base_vit, dtype, seed)
    side = base.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape.few_images, 3, side, side, generator=generator).to(place(), dtype)
    labels = torch.randint(base.num_classes, (shape.few_images,), generator=generator).to(place())
    ways = tuple(Contender(name, step(model, images, labels)) for name, model in models(base, rank).items())
    pairs = tuple((way.name, "lora") for way in ways if way.name != "lora")
    what = f"{shape.base_vit}, batch {shape.few_images}, LoRA's rank {rank} on qkv, {str(dtype).removeprefix('torch.')}"
    return [
        Contest("side networks, step", f"forward, loss, backward, SGD on {what}", ways, pairs),
        Contest("side networks, peak memory of a step", what, ways, pairs, unit="MB"),
    ]


def models(base: nn.Module, rank: int) -> dict[str, nn.Module]:
    """A copy of the base for each method; all but full fine-tuning share the base's tensors."""
    found: dict[str, nn.Module] = {"lora": sharing(base)}
    attach(found["lora"], "lora", rank=rank, **METHODS["lora"])
    for method in ("lst", "dtl"):
        found[method] = sharing(base)
        attach(found[method], method, **METHODS[method])
    probe: Any = sharing(base)
    probe.head = copy.deepcopy(probe.head).requires_grad_(True)
    return {**found, "linear probe": probe, "full": copy.deepcopy(base).requires_grad_(True)}


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[Any], float]:
    """A function that runs one training step and returns the loss. Gradients are freed at its end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)

    def run(_: Any) -> float:
        loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run
