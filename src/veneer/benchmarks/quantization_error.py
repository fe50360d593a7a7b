"""Errors of a quantized base model against float32: of its weights, and of the noise that it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer import base_models
from veneer.base_models.quantization import linear_layers
from veneer.injection.quantized_weight import float_weight, is_quantized

TIMESTEPS = (100, 500, 900)
"""Timesteps of the inputs on which predicted noise is compared, from almost clean to almost pure noise."""


def errors(kind: str) -> tuple[float, float]:
    """Relative errors of the weights of the quantized layers, and of the predicted noise, of the bundled base model."""
    plain, quantized = base_models.load("bundled"), base_models.load("bundled", quantize=kind)
    original = {name: module.weight for name, module in plain.unet.named_modules() if name in set(linear_layers(plain.unet))}
    layers = {name: m for name, m in quantized.unet.named_modules() if name in original and is_quantized(m.weight)}
    weights = [(float_weight(module), original[name].detach()) for name, module in layers.items()]
    return _relative(weights), _relative([(_noise(quantized, t), _noise(plain, t)) for t in TIMESTEPS])


def _relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """‖a − b‖ / ‖b‖ over all pairs."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return float((difference / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5)


@torch.no_grad()
def _noise(pipe: Any, timestep: int) -> Tensor:
    """The UNet's prediction for fixed noise and the prompt of the class word."""
    size = pipe.unet.config.sample_size
    generator = torch.Generator().manual_seed(timestep)
    latents = torch.randn(4, pipe.unet.config.in_channels, size, size, generator=generator)
    tokens = pipe.tokenizer(
        ["a photo of a shoe"] * 4, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    )
    texts = pipe.text_encoder(tokens.input_ids)[0]
    prediction: Tensor = pipe.unet(latents, timestep, texts).sample
    return prediction
