"""Image embeddings for IP-Adapter, from the pipeline's image encoder or the bundled CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from veneer.training.report.feature_models import features


@dataclass(frozen=True)
class Embedder:
    """An image encoder.

    Args:
        name: name of the encoder, saved with adapters trained on it.
        width: width of the embeddings. `run`: images to (images, width).
    """

    name: str
    width: int
    run: Any

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings, (images, width), float32 on the CPU."""
        found: Tensor = self.run(list(images)).float().cpu()
        return found


def embedder(pipe: Any) -> Embedder:
    """The image encoder of a pipeline: `image_encoder` with `feature_extractor`, else the features of the bundled CLIP."""
    encoder, extractor = (getattr(pipe, name, None) for name in ("image_encoder", "feature_extractor"))
    if encoder is None or extractor is None:
        bundled = features("bundled", pipe.device)
        width = bundled.images([Image.new("RGB", (64, 64))]).shape[-1]
        return Embedder("bundled CLIP", width, lambda images: bundled.images(images) * width**0.5)

    def run(images: list[Image.Image]) -> Any:
        pixels = extractor(images, return_tensors="pt").pixel_values.to(encoder.device, encoder.dtype)
        return encoder(pixels).image_embeds

    return Embedder(type(encoder).__name__, encoder.config.projection_dim, run)
