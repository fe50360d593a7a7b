"""Several LoRAs on one UNet: switching between adapters, mixed batches with one adapter per sample, and the cost of one LoRA.

Switching is timed with 1, 10 and 50 attached LoRAs, and compared with peft's `set_adapters`. The forward passes are without
gradients, at batch size eight: the base without adapters; one LoRA for all samples; one enabled of 50 attached; and eight LoRAs,
one per sample, in veneer's mixed batch and in peft's. All share the tensors of one frozen base.

Lower bounds: in addition to the base, one LoRA multiplies each token by A and B, r·(d_in + d_out) instead of d_in·d_out weights,
and reads and writes the output once more. A mixed batch computes these products on the same rows, in eight parts, and writes the
output a second time, when the parts are concatenated.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import activate, attach, attachments, mixed

from . import peers
from .interleaved_timing import Contender, Contest
from .shapes import Shape, place, sharing, unet

COUNTS = (1, 10, 50)
BATCH = 8
CHOICES = 10
"""Switches per timing, because one takes milliseconds only."""


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Contests of switching, and of the forward pass of a batch.

    Args:
        rank: of each LoRA on every attention projection.
        dtype: of the frozen base; adapters are float32.
    """
    base = unet(shape.unet, shape.latent, dtype, seed).eval()
    ours = {count: _veneers(sharing(base), rank, count) for count in COUNTS}
    return [_choosing(base, rank, ours), _passing(base, rank, ours[COUNTS[-1]], _inputs(shape, dtype, seed), shape)]


def _choosing(base: nn.Module, rank: int, ours: dict[int, nn.Module]) -> Contest:
    """Switches to another adapter; a single one is enabled and disabled."""
    ways = [Contender(f"veneer, {count}", _chooser(model)) for count, model in ours.items()]
    pairs = [(f"veneer, {count}", "veneer, 1") for count in COUNTS[1:]]
    if peers.has_peft():
        for count in COUNTS[1:]:
            ways.append(Contender(f"peft, {count}", _peft_chooser(_pefts(sharing(base), rank, count), count)))
            pairs.append((f"veneer, {count}", f"peft, {count}"))
    what = f"switch between 1, 10 or 50 attached LoRAs of rank {rank} on every attention projection"
    return Contest("switching", what, tuple(ways), tuple(pairs), calls=CHOICES)


def _passing(base: nn.Module, rank: int, many: nn.Module, inputs: tuple[Tensor, ...], shape: Shape) -> Contest:
    one, mix = _veneers(sharing(base), rank, 1), _veneers(sharing(base), rank, BATCH)
    names = [a.name for a in attachments(mix)]
    activate(many, attachments(many)[0].name)

    def mixture(_: Any) -> object:
        with mixed(mix, names), torch.no_grad():
            return mix(*inputs).sample

    ways = [
        Contender("base", _forward(base, inputs)),
        Contender("one", _forward(one, inputs)),
        Contender(f"one of {COUNTS[-1]}", _forward(many, inputs)),
        Contender("mixed", mixture),
    ]
    pairs = [("one", "base"), (f"one of {COUNTS[-1]}", "one"), ("mixed", "one")]
    if peers.has_peft():
        ways.append(Contender("peft, mixed", _peft_mixture(sharing(base), rank, inputs)))
        pairs.append(("mixed", "peft, mixed"))
    what = (
        f"forward pass without gradients at batch size {BATCH}, LoRA of rank {rank} on every attention projection: none, one for "
        f"all, one enabled of {COUNTS[-1]}, {BATCH} with one per sample; {shape.latent}×{shape.latent} latents"
    )
    return Contest("mixed batch", what, tuple(ways), tuple(pairs), shape.calls)


def _veneers(model: nn.Module, rank: int, count: int) -> nn.Module:
    for number in range(count):
        attach(model, "lora", rank=rank, where=peers.where(model), name=f"lora_{number}")
    return model


def _chooser(model: nn.Module) -> Callable[[Any], object]:
    names = [a.name for a in attachments(model)]
    turns: Any = itertools.cycle(names[:2] if len(names) > 1 else [names, ()])
    return lambda _: activate(model, next(turns))


def _pefts(model: Any, rank: int, count: int) -> Any:
    """Adds LoRAs to the UNet by diffusers' `add_adapter`, which uses peft."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=peers.targets(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
        for number in range(count):
            model.add_adapter(config, adapter_name=f"lora_{number}")
    return model.eval()


def _peft_chooser(model: Any, count: int) -> Callable[[Any], object]:
    turns = itertools.cycle(f"lora_{number}" for number in range(min(count, 2)))
    return lambda _: model.set_adapters(next(turns))


def _peft_mixture(model: nn.Module, rank: int, inputs: tuple[Tensor, ...]) -> Callable[[Any], object]:
    """Forward pass of peft's mixed batch, with the model in peft's wrapper."""
    from peft import LoraConfig, get_peft_model

    names = [f"lora_{number}" for number in range(BATCH)]
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=peers.targets(model))
    wrapped: Any = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.eval()

    def forward(_: Any) -> object:
        with torch.no_grad():
            return wrapped(*inputs, adapter_names=names).sample

    return forward


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Random inputs: (noisy latents, timestep, text embeddings)."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(BATCH, 4, shape.latent, shape.latent, generator=generator)
    text = torch.randn(BATCH, shape.tokens, shape.unet["cross_attention_dim"], generator=generator)
    return latents.to(place(), dtype), torch.tensor([500], device=place()), text.to(place(), dtype)


def _forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[Any], object]:
    def forward(_: Any) -> object:
        with torch.no_grad():
            return model(*inputs).sample

    return forward
