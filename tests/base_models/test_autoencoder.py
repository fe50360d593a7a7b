"""The encoder: a linear code of patches, close to the latents of a former autoencoder."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from veneer.base_models.pretraining import autoencoder
from veneer.base_models.pretraining.autoencoder import LATENT, LOGVAR, PATCH, LinearCode


def smooth_images(count: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    """Images (count, 3, side, side) in about -1..1, of waves with different wavelengths."""
    generator = torch.Generator().manual_seed(seed)
    waves = [
        F.interpolate(torch.randn(count, 3, n, n, generator=generator), (side, side), mode="bicubic") for n in (3, 6, 12, 24)
    ]
    return sum(wave / 2**i for i, wave in enumerate(waves)).mul(0.4).clamp(-1, 1)


def reference(code: LinearCode, images: torch.Tensor) -> torch.Tensor:
    """The code, computed for each patch separately."""
    n, _, height, width = images.shape
    out = torch.empty(n, LATENT, height // PATCH, width // PATCH)
    for row in range(height // PATCH):
        for column in range(width // PATCH):
            part = images[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            out[:, :, row, column] = (part.flatten(1) - code.mean) @ code.projection
    return out


@torch.no_grad()
def test_initialized_encoder_computes_the_linear_code() -> None:
    images = smooth_images(48)
    code = autoencoder.linear_code(images)
    expected = reference(code, images)
    torch.testing.assert_close(code(images), expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    found = autoencoder.init_linear_encoder(autoencoder.build(), code).encode(images[:16]).latent_dist
    error = (found.mean - expected[:16]).square().mean() / expected[:16].square().mean()
    assert error < 1e-3
    torch.testing.assert_close(found.logvar, torch.full_like(found.logvar, LOGVAR), atol=0.05, rtol=0)


@torch.no_grad()
def test_linear_code_is_the_principal_components() -> None:
    images = smooth_images(48)
    code = autoencoder.linear_code(images)
    rows = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
    coded = code(images).permute(0, 2, 3, 1).flatten(0, 2)
    covariance = coded.T @ coded / len(coded)
    assert coded.mean(0).abs().max() < 1e-4
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 1e-4
    assert variances.mean() == pytest.approx(1, abs=1e-3)
    centered = rows - rows.mean(0)
    basis = torch.linalg.svd(centered, full_matrices=False)[2][:LATENT].T
    lost = centered - centered @ basis @ basis.T
    decoded = coded @ torch.linalg.lstsq(coded, centered).solution
    assert (centered - decoded).square().mean() == pytest.approx(lost.square().mean().item(), rel=1e-3)


@torch.no_grad()
def test_former_autoencoder_rotates_and_scales_the_code() -> None:
    images = smooth_images(48)
    torch.manual_seed(0)
    former = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 16),
        layers_per_block=1, latent_channels=8, norm_num_groups=1, mid_block_add_attention=False,
    ).eval()  # fmt: skip
    plain, turned = autoencoder.linear_code(images), autoencoder.linear_code(images, former)
    turn = torch.linalg.lstsq(plain.projection, turned.projection).solution
    square = turn.T @ turn
    scale = square.diagonal().mean()
    torch.testing.assert_close(square / scale, torch.eye(LATENT), atol=1e-3, rtol=0)
    known = former.encode(F.avg_pool2d(images, 2)).latent_dist.mean
    known = known - known.mean((0, 2, 3), keepdim=True)
    found = turned(images)[:, : known.shape[1]]
    residual = (found - known).square().sum()
    for seed in range(5):
        other = torch.linalg.qr(torch.randn(LATENT, LATENT, generator=torch.Generator().manual_seed(seed)))[0]
        rival = (plain(images).permute(0, 2, 3, 1) @ other).permute(0, 3, 1, 2)[:, : known.shape[1]] * scale.sqrt()
        assert residual < (rival - known).square().sum()
    best = (found * known).sum() / found.square().sum()
    assert best.item() == pytest.approx(1, abs=1e-3)  # no other factor is nearer
