"""Training step and forward pass of a UNet: veneer's LoRA compared with the floor and with peft's LoRA.

The floor is a lower bound of any step that trains a parameter at the input: the same forward pass, loss, backward pass through
every frozen layer and optimizer step, with one scalar parameter added to the noisy latents instead of adapters. The time of a
LoRA step beyond it is the overhead of LoRA. All contenders share the tensors of one frozen base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import peers
from .interleaved_timing import Contender, Contest
from .shapes import Shape, place, sharing, unet


class Floor(nn.Module):
    """A frozen model whose only trainable parameter is a scalar added to its input."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, sample: Tensor, *args: Tensor) -> Any:
        """The base's output."""
        return self.base(sample + self.offset.to(sample.dtype), *args)


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Contests of the training step, and of the forward pass without gradients.

    Args:
        rank: of the LoRA on every attention projection.
        dtype: of the frozen base; adapters are float32.
    Raises:
        BenchError: veneer and peft have different numbers of trainable parameters.
    """
    base = unet(shape.unet, shape.latent, dtype, seed)
    models: dict[str, nn.Module] = {"floor": Floor(base), "veneer": peers.with_veneer(sharing(base), rank)}
    pairs = [("veneer", "floor")]
    if peers.has_peft():
        models["peft"] = peers.with_peft(sharing(base), rank)
        peers.check_equal(models["veneer"], models["peft"])
        pairs += [("peft", "floor"), ("veneer", "peft")]
    given = inputs(shape, dtype, seed)
    steps = tuple(Contender(name, step(model, *given)) for name, model in models.items())
    passes = tuple(Contender(name, _forward(model, *given[0])) for name, model in models.items())
    size = f"{shape.latent}×{shape.latent} latents, batch 1, rank {rank}, {str(dtype).removeprefix('torch.')}"
    what = "forward, loss, backward, AdamW on a UNet of widths"
    widths = ", ".join(map(str, getattr(base.config, "block_out_channels")))  # noqa: B009 (a config of any attributes)
    return [
        Contest("training step", f"{what} {widths}; {size}", steps, tuple(pairs), shape.calls),
        Contest("forward pass", f"the same without gradients; {size}", passes, tuple(pairs), shape.calls),
    ]


def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Random inputs and target: ((noisy latents, timestep, text embeddings), target)."""
    generator = torch.Generator().manual_seed(seed)
    latents, target = torch.randn(2, 1, 4, shape.latent, shape.latent, generator=generator)
    text = torch.randn(1, shape.tokens, shape.unet["cross_attention_dim"], generator=generator)
    noisy, timestep, context = latents.to(place(), dtype), torch.tensor([500], device=place()), text.to(place(), dtype)
    return (noisy, timestep, context), target.to(place())


def step(model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Callable[[Any], float]:
    """A function that runs one optimizer step and returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run(_: Any) -> float:
        output = model(*inputs)
        loss = F.mse_loss(getattr(output, "sample", output).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def _forward(model: nn.Module, *inputs: Tensor) -> Callable[[Any], object]:
    def forward(_: Any) -> object:
        with torch.no_grad():
            return model(*inputs).sample

    return forward
