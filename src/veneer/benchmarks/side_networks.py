"""Memory and time of a training step on an image model: side networks against LoRA, a linear probe and full fine-tuning.

What a step holds at its peak is mostly what blocks keep for the backward pass. A probe keeps nothing of them, LST one tensor a
block for its own matrices, DTL that and all of the blocks after its first write, LoRA all of every block, and full fine-tuning
also has gradients of the whole model. Each step is forward, loss, backward, SGD without momentum: no optimiser state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from veneer.injection import attach

from .contest import Contender, Contest
from .shapes import Shape, place, sharing, vit

METHODS: dict[str, dict[str, Any]] = {"lora": {"where": "attn.qkv"}, "lst": {}, "dtl": {}}
"""Method to its options; LoRA has its rank from the settings."""


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Peak memory and time of a step, each against LoRA's.

    Args:
        rank: of LoRA. `dtype`: of the base; adapters are float32.
    """
    base = vit(shape.base_vit, dtype, seed)
    side = base.patch_embed.img_size[0]
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randn(shape.few_images, 3, side, side, generator=draw).to(place(), dtype)
    labels = torch.randint(base.num_classes, (shape.few_images,), generator=draw).to(place())
    ways = tuple(Contender(name, step(model, pictures, labels)) for name, model in models(base, rank).items())
    pairs = tuple((way.name, "lora") for way in ways if way.name != "lora")
    what = f"{shape.base_vit}, batch {shape.few_images}, LoRA's rank {rank} on qkv, {str(dtype).removeprefix('torch.')}"
    return [
        Contest("side networks, step", f"forward, loss, backward, SGD on {what}", ways, pairs),
        Contest("side networks, peak memory of a step", what, ways, pairs, unit="MB"),
    ]


def models(base: nn.Module, rank: int) -> dict[str, nn.Module]:
    """Each way to train the base, on modules of its own; all but full fine-tuning share the base's tensors."""
    found: dict[str, nn.Module] = {"lora": sharing(base)}
    attach(found["lora"], "lora", rank=rank, **METHODS["lora"])
    for method in ("lst", "dtl"):
        found[method] = sharing(base)
        attach(found[method], method, **METHODS[method])
    probe: Any = sharing(base)
    probe.head = copy.deepcopy(probe.head).requires_grad_(True)
    return {**found, "linear probe": probe, "full": copy.deepcopy(base).requires_grad_(True)}


def step(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> Callable[[Any], float]:
    """A training step of what requires gradients; gives the loss. Gradients are freed at its end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)

    def run(_: Any) -> float:
        loss = F.cross_entropy(model(pictures).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run
