"""Images in the outputs of pipelines, and latents in those of VAEs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def generated_images(output: Any) -> list[Any]:
    """The images in the output of a pipeline, of videos the first frames."""
    name = next((name for name in ("images", "image") if name in output), None)
    return [frames[0] for frames in output.frames] if name is None else list(output[name])


def posterior(encoded: Any) -> tuple[Tensor, Tensor]:
    """(mean, std) of the output of a VAE's `encode`; std is 0 for an autoencoder without a posterior, such as DC-AE."""
    if "latent" in encoded:
        return encoded.latent, torch.zeros_like(encoded.latent)
    return encoded.latent_dist.mean, encoded.latent_dist.std
