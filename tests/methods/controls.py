"""Tiny pipelines, images and networks for comparisons of control methods with diffusers' classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from veneer.testing.pipelines import tiny_pipeline

SIDE = 32
PROMPTS = ["a red house", "two dogs"]
THREE: dict[str, Any] = {  # three blocks, as SDXL has them
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 48), "attention_head_dim": 2, "transformer_layers_per_block": 1,
}  # fmt: skip


def pipeline(family: str = "sd", **denoiser: Any) -> Any:
    """A tiny pipeline, without the warning about the safety checker."""
    return tiny_pipeline(family, **denoiser)


def picture(seed: int, side: int = SIDE) -> Image.Image:
    """An image of noise in large pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BILINEAR)


def stir(module: torch.nn.Module, seed: int = 3, size: float = 0.3) -> torch.nn.Module:
    """Perturb every parameter with fixed random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=size)
    return module.eval()


def drawn(pipe: Any, *, prompts: Any = PROMPTS[0], seed: int = 0, steps: int = 4, side: int = SIDE, **options: Any) -> np.ndarray:
    """Images of a pipeline with fixed noise."""
    pipe.set_progress_bar_config(disable=True)
    size = {"height": side, "width": side} if side and "mask_image" not in options else {}
    found = pipe(
        prompts, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="np",
        **{"guidance_scale": 4.0, **size, **options},
    )  # fmt: skip
    return np.asarray(found.images)
