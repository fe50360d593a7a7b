"""Pictures as an IP-Adapter is given them: by the pipeline's own image encoder, or by the bundled CLIP where it has none."""

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
    """An encoder of pictures.

    Args:
        name: of the encoder, which is saved with what learns from it.
        width: of the embeddings. `run`: pictures to (pictures, width).
    """

    name: str
    width: int
    run: Any

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(pictures, width), single precision, on the CPU."""
        found: Tensor = self.run(list(pictures)).float().cpu()
        return found


def embedder(pipe: Any) -> Embedder:
    """The encoder for a pipeline: `image_encoder` with `feature_extractor`, else the bundled CLIP's unit features."""
    encoder, extractor = (getattr(pipe, name, None) for name in ("image_encoder", "feature_extractor"))
    if encoder is None or extractor is None:
        bundled = features("bundled", pipe.device)
        width = bundled.pictures([Image.new("RGB", (64, 64))]).shape[-1]
        return Embedder("bundled CLIP", width, lambda pictures: bundled.pictures(pictures) * width**0.5)

    def run(pictures: list[Image.Image]) -> Any:
        pixels = extractor(pictures, return_tensors="pt").pixel_values.to(encoder.device, encoder.dtype)
        return encoder(pixels).image_embeds

    return Embedder(type(encoder).__name__, encoder.config.projection_dim, run)
