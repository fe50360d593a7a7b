"""The autoencoder: 64x64x3 pictures to 16x16x8 latents, a small `AutoencoderKL`.

The encoder first imitates the best linear code (principal components of 4x4 patches), which spares it the slow part of
the training; the decoder learns on crops, then on whole frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from .loop import Run, cosine
from .render import Pixels

LATENT = 8
PATCH = 4
LOGVAR = -6.0


def build() -> Any:
    """The untrained autoencoder (0.7 M parameters)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def to_tensor(pictures: Pixels) -> Tensor:
    """(n, h, w, 3) bytes to (n, 3, h, w) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(pictures: Tensor) -> Pixels:
    """(n, 3, h, w) in -1..1 to (n, h, w, 3) bytes."""
    scaled = (pictures.float().clamp(-1, 1) + 1) * 127.5
    return np.asarray(scaled.round().byte().permute(0, 2, 3, 1).contiguous().numpy())


def patch_components(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (48,) and projection (48, 8) of the linear code of 4x4 patches.

    Each component is divided by the square root of its own deviation, which keeps their order of importance but lifts
    the faint ones above the noise; the whole code has unit variance.
    """
    patches = F.pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1).reshape(-1, 3 * PATCH**2)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    deviation, basis = values.flip(0)[:LATENT].clamp_min(1e-8).sqrt(), vectors.flip(1)[:, :LATENT]
    return mean, basis / deviation.sqrt() / deviation.mean().sqrt()


def code(pictures: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    """The linear code of the pictures, (n, 8, h/4, w/4)."""
    patches = F.pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1)
    return ((patches - mean) @ projection).permute(0, 3, 1, 2)


def reconstruction_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """L1 on pixels, on their differences along both axes and on 4x4 means, and a squared error."""
    error = ours - theirs
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + F.avg_pool2d(error, 4).abs().mean() + 2 * error.square().mean()


def train(folder: Path, pictures: Callable[[int, int], Pixels], steps: int, batch: int, lr: float) -> Any:
    """Train (or go on training) the autoencoder on `pictures(step, n)`; returns it with its EMA weights, standardised."""
    vae = build().to(memory_format=torch.channels_last)
    mean, projection = patch_components(to_tensor(pictures(0, 2048)))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(folder, vae, [optimizer], cosine(steps), decay=0.998)
    run.resume()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((11, step))
        frames = pictures(step, batch if step >= 0.7 * steps else 3 * batch)
        if step < 0.7 * steps:
            top, left = rng.integers(0, 9, 2) * PATCH
            frames = frames[:, top : top + 32, left : left + 32]
        x = to_tensor(np.ascontiguousarray(frames)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(x))
            mu, logvar = moments.float().chunk(2, dim=1)
            noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(step))
            y = vae.decoder(vae.post_quant_conv(mu + noise * (0.5 * logvar.clamp(-12, 4)).exp())).float()
        imitation = max(0.05, 1 - 2 * step / steps)
        likeness = (mu - code(x, mean, projection)).square().mean()
        return reconstruction_loss(y, x) + imitation * likeness + 0.01 * (logvar - LOGVAR).square().mean()

    run.train(loss, steps)
    vae.load_state_dict(run.averaged())
    return standardise(vae, to_tensor(pictures(0, 1024)))


def refine(folder: Path, vae: Any, pictures: Callable[[int, int], Pixels], steps: int, batch: int, lr: float) -> Any:
    """Train the decoder further on whole frames, at fixed latents: what was trained on them stays as it is."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    run = Run(
        folder, vae.decoder, [torch.optim.AdamW(vae.decoder.parameters(), lr=lr, betas=(0.9, 0.99))], cosine(steps), decay=0.998
    )
    run.resume()

    def loss(step: int) -> Tensor:
        x = to_tensor(pictures(step + 100_000, batch)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(x).latent_dist.mean
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
            y = vae.decoder(vae.post_quant_conv(mean + math.exp(LOGVAR / 2) * noise)).float()
        return reconstruction_loss(y, x)

    run.train(loss, steps)
    vae.decoder.load_state_dict(run.averaged())
    return vae


@torch.no_grad()
def standardise(vae: Any, pictures: Tensor) -> Any:
    """Fold an affine map into the two 1x1 convolutions: latents get zero mean per channel and unit variance overall.

    Stable Diffusion pipelines know a scaling factor and no shift, so the shift must live in the weights.
    """
    latents = vae.encode(pictures).latent_dist.mean
    mean, scale = latents.mean((0, 2, 3)), 1 / latents.std((0, 2, 3)).square().mean().sqrt()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight /= scale
    vae.quant_conv.weight[:LATENT] *= scale
    vae.quant_conv.bias[:LATENT] = (vae.quant_conv.bias[:LATENT] - mean) * scale
    vae.quant_conv.bias[LATENT:] += 2 * scale.log()
    return vae


@torch.no_grad()
def psnr(vae: Any, pictures: Pixels) -> float:
    """Mean over pictures of 10 log10(255^2 / MSE), through the latent mean and byte rounding."""
    pairs = [(p, to_pixels(vae.decode(vae.encode(to_tensor(p)).latent_dist.mean).sample)) for p in
             np.array_split(pictures, max(1, len(pictures) // 32))]  # fmt: skip
    errors = [np.square(a.astype(np.float64) - b).mean((1, 2, 3)) for a, b in pairs]
    return float(np.mean(10 * np.log10(255**2 / np.concatenate(errors))))
