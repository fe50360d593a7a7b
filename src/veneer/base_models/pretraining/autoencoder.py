"""The autoencoder: 128x128x3 images to 16x16x16 latents, a small `AutoencoderKL`.

The encoder computes a linear code of 8x8 patches and is not trained; the decoder is trained on crops, then on whole images.
With a former autoencoder of half the resolution, the code is rotated so that its first channels are close to the former
latents of the image at half size: a denoiser trained on those can continue from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from .data.icon_sets import Pixels
from .muon import optimizers
from .training_loop import TrainingRun, cosine

LATENT = 16
PATCH = 8
LOGVAR = -6.0


def build() -> Any:
    """The untrained autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=1,
        sample_size=128,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def to_tensor(images: Pixels) -> Tensor:
    """(n, h, w, 3) bytes to (n, 3, h, w) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> Pixels:
    """(n, 3, h, w) in -1..1 to (n, h, w, 3) bytes."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return np.asarray(scaled.round().byte().permute(0, 2, 3, 1).contiguous().numpy())


def patches(images: Tensor) -> Tensor:
    """Pixels of each 8x8 patch, (n, h/8, w/8, 192)."""
    return F.pixel_unshuffle(images, PATCH).permute(0, 2, 3, 1)


def components(rows: Tensor, count: int) -> Tensor:
    """Projection (d, count) onto the principal components of the rows (n, d), which have zero mean.

    Each component is divided by the square root of its standard deviation, which keeps their order of importance but lifts
    the faint ones above the noise; the whole code has unit variance.
    """
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    deviation, basis = values.flip(0)[:count].clamp_min(1e-8).sqrt(), vectors.flip(1)[:, :count]
    return basis / deviation.sqrt() / deviation.mean().sqrt()


@dataclass(frozen=True)
class LinearCode:
    """A linear code of 8x8 patches: principal components, rotated towards the latents of a former autoencoder.

    Args:
        mean: of the patches, (192,).
        projection: (192, 16).
    """

    mean: Tensor
    projection: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """The code of the images, (n, 16, h/8, w/8)."""
        return ((patches(images) - self.mean) @ self.projection).permute(0, 3, 1, 2)


@torch.no_grad()
def linear_code(images: Tensor, former: Any = None) -> LinearCode:
    """The linear code of the images' principal components.

    With a former autoencoder, of 4x4 patches and fewer channels, an orthogonal map rotates the code so that its first channels
    are as close as possible to the former latents of the images at half size, and a factor scales it to them: noise stays
    independent and of unit variance, and a denoiser of the former latents can continue training.
    """
    rows = patches(images).flatten(0, 2)
    mean = rows.mean(0)
    projection = components(rows - mean, LATENT)
    if former is None:
        return LinearCode(mean, projection)
    known = torch.cat([former.encode(F.avg_pool2d(x, 2)).latent_dist.mean for x in images.split(32)])
    known = known.permute(0, 2, 3, 1).flatten(0, 2)
    coded = (rows - mean) @ projection
    left, values, right = torch.linalg.svd(coded.T @ (known - known.mean(0)), full_matrices=True)
    turn = torch.cat([left[:, : len(values)] @ right, left[:, len(values) :]], 1)
    scale = values.sum() / (coded @ turn)[:, : len(values)].square().sum()
    return LinearCode(mean, projection @ turn * scale)


@torch.no_grad()
def init_linear_encoder(vae: Any, code: LinearCode) -> Any:
    """Initializes the encoder to compute the code, by its trunk alone; its residual branches are initialized to zero.

    Pixels of 2x2 blocks, then the leading components of 4x4 patches, then the code come from the three strided convolutions. A
    channel and its negative together pass SiLU unchanged: silu(x) - silu(-x) = x. Two large constants, one of which is
    negative, make the last normalization nearly the same for all images; its weights undo it.
    """
    encoder, constant = vae.encoder, 30.0
    trunk = [encoder.conv_in, *(d.conv for block in encoder.down_blocks for d in block.downsamplers or ())]
    blocks = [r for block in encoder.down_blocks for r in block.resnets]
    for block in [*blocks, *encoder.mid_block.resnets]:
        for layer in [block.conv2, *([block.conv_shortcut] if block.conv_shortcut is not None else [])]:
            layer.weight.zero_()
            layer.bias.zero_()
        if block.conv_shortcut is not None:
            block.conv_shortcut.weight[: block.in_channels, :, 0, 0] = torch.eye(block.in_channels)
    for layer in (*trunk, encoder.conv_out, vae.quant_conv):
        layer.weight.zero_()
        layer.bias.zero_()
    pixels, fine, last = trunk[1:]
    trunk[0].weight[:3, :, 1, 1] = torch.eye(3)
    for channel, (row, column) in itertools.product(range(3), itertools.product(range(2), repeat=2)):
        pixels.weight[4 * channel + 2 * row + column, channel, row, column] = 1
    basis, projection = _fine_basis(code, fine.out_channels - 1)
    fine.weight[: basis.shape[1], :12, :2, :2] = _as_blocks(basis)
    signed = torch.cat([projection, -projection], 1)
    last.weight[: 2 * LATENT, : basis.shape[1], :2, :2] = signed.T.reshape(2 * LATENT, basis.shape[1], 2, 2)
    offset = code.mean @ code.projection
    last.bias[: 2 * LATENT] = torch.cat([-offset, offset])
    blocks[-1].conv_shortcut.bias[-2:] = torch.tensor([constant, -constant])
    width = encoder.conv_norm_out.num_channels
    for norm in [encoder.conv_norm_out, *(r.norm1 for r in encoder.mid_block.resnets)]:
        norm.weight.fill_((2 * constant**2 / width) ** 0.5)
    encoder.conv_out.weight[:LATENT, :LATENT, 1, 1] = torch.eye(LATENT)
    encoder.conv_out.weight[:LATENT, LATENT : 2 * LATENT, 1, 1] = -torch.eye(LATENT)
    encoder.conv_out.bias[LATENT:] = LOGVAR
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2 * LATENT)
    return vae


def _fine_basis(code: LinearCode, count: int) -> tuple[Tensor, Tensor]:
    """A basis (48, count) of 4x4 patches that preserves the code, and the code's projection (4 count, 16) on it."""
    quarters = code.projection.reshape(3, 2, 4, 2, 4, LATENT).permute(1, 3, 0, 2, 4, 5).reshape(4, 48, LATENT)
    basis = torch.linalg.svd(quarters.permute(1, 0, 2).reshape(48, -1))[0][:, :count]
    return basis, torch.einsum("qpl,pc->cql", quarters, basis).reshape(4 * count, LATENT)


def _as_blocks(basis: Tensor) -> Tensor:
    """The basis of 4x4 patches as a 2x2 convolution (count, 12, 2, 2) on pixels of 2x2 blocks."""
    return basis.T.reshape(-1, 3, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 12, 2, 2)


def reconstruction_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """L1 on pixels, on their differences along both axes and on 4x4 means, and a squared error."""
    error = ours - theirs
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + F.avg_pool2d(error, 4).abs().mean() + 2 * error.square().mean()


def train_decoder(folder: Path, vae: Any, images: Callable[[int, int], Pixels], steps: int, batch: int) -> Any:
    """Trains (or resumes) the decoder at fixed latents, on crops of twice as many images for the first 85 % of the steps.

    Returns:
        The autoencoder with the EMA weights of the decoder.
    """
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    run = TrainingRun(folder, vae.decoder, optimizers(vae.decoder, 2e-3, 2e-3), cosine(steps), decay=0.998)
    run.resume()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((11, step))
        whole = step >= 0.85 * steps
        frames = images(step, batch if whole else 2 * batch)
        if not whole:
            top, left = rng.integers(0, 9, 2) * PATCH
            frames = np.ascontiguousarray(frames[:, top : top + 64, left : left + 64])
        x = to_tensor(frames).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            mean = vae.encode(x).latent_dist.mean
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decoder(vae.post_quant_conv(mean + math.exp(LOGVAR / 2) * noise)).float()
        return reconstruction_loss(y, x)

    run.train(loss, steps, every=50)
    vae.decoder.load_state_dict(run.averaged())
    return vae


@torch.no_grad()
def psnr(vae: Any, images: Pixels) -> float:
    """Mean over images of 10 log10(255^2 / MSE), through the latent mean and byte rounding."""
    pairs = [(p, to_pixels(vae.decode(vae.encode(to_tensor(p)).latent_dist.mean).sample)) for p in
             np.array_split(images, max(1, len(images) // 32))]  # fmt: skip
    errors = [np.square(a.astype(np.float64) - b).mean((1, 2, 3)) for a, b in pairs]
    return float(np.mean(10 * np.log10(255**2 / np.concatenate(errors))))
