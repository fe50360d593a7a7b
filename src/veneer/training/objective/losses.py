"""Weighted and masked per-sample losses, and the prior-preservation mean over photos and class images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection.errors import OptionError

LossKind = Literal["l2", "huber", "smooth_l1"]
MaskMean = Literal["plain", "normalized"]


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: LossKind = "l2",
    huber_c: float | Tensor = 0.1,
    mask_mean: MaskMean = "plain",
    mask_floor: float = 0.0,
) -> Tensor:
    """ℓ_i = w_i · mean(m_i · d(prediction_i, target_i)) in float32, (batch,).

    Args:
        prediction, target: (batch, channels, height, width).
        weight: (batch,) (default: 1).
        mask: (batch, 1, H, W) in [0, 1] of any size, resized to the latents by area (default: no mask).
        kind: d: `l2` (p − t)²; `huber` 2c(√((p − t)² + c²) − c); `smooth_l1` 2(√((p − t)² + c²) − c).
        huber_c: c, a float or (batch,).
        mask_mean: `plain` divides by the number of elements, so that a small mask gives a small loss (kohya sd-scripts);
            `normalized` divides by Σm (Mix-of-Show). An empty mask gives 0 in both.
        mask_floor: f; the mask becomes f + (1 − f)·m, so that pixels outside it keep weight f.
    Raises:
        OptionError: unknown `kind` or `mask_mean`, or different shapes.
    """
    if prediction.shape != target.shape:
        given, expected = tuple(prediction.shape), tuple(target.shape)
        message = f"prediction {given} and target {expected} differ in shape"
        raise OptionError(message, option="prediction", given=given, expected=expected)
    distance = _distance(prediction.float(), target.float(), kind, huber_c)
    if mask is None:
        losses = distance.flatten(1).mean(1)
    else:
        area = F.interpolate(mask.to(distance), prediction.shape[-2:], mode="area")
        area = (mask_floor + (1 - mask_floor) * area).expand_as(distance)
        if mask_mean == "plain":
            losses = (distance * area).flatten(1).mean(1)
        elif mask_mean == "normalized":
            total = area.flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
            losses = (distance * area).flatten(1).sum(1) / total
        else:
            raise OptionError(
                f"mask_mean must be 'plain' or 'normalized', got {mask_mean!r}", option="mask_mean", given=mask_mean
            )
    return losses if weight is None else losses * weight.to(losses)


def prior_preservation(losses: Tensor, is_prior: Tensor, prior_weight: float = 1.0) -> Tensor:
    """Mean of ℓ over photos + λ · mean of ℓ over class images: a scalar; the mean of an empty group is 0.

    Args:
        losses: ℓ, (batch,). `is_prior`: (batch,), bool: True for class images. `prior_weight`: λ.
    Source: Ruiz et al., CVPR 2023 (DreamBooth), equation 2.
    """
    prior = is_prior.to(losses.device, torch.bool)
    n, m = int((~prior).sum()), int(prior.sum())
    photos = torch.where(prior, 0.0, losses).sum() / max(n, 1)
    return photos + prior_weight * torch.where(prior, losses, 0.0).sum() / max(m, 1)


def huber_threshold(snr: Tensor, c: float = 0.1) -> Tensor:
    """c_t = (1 − c) / (1 + σ_t)² + c with σ_t = SNR_t^(−1/2): from 1 without noise down to `c`. Source: kohya sd-scripts."""
    return (1 - c) / (1 + snr.clamp(min=1e-12).rsqrt()) ** 2 + c


def _distance(prediction: Tensor, target: Tensor, kind: str, c: float | Tensor) -> Tensor:
    square = (prediction - target) ** 2
    if kind == "l2":
        return square
    if isinstance(c, Tensor):
        c = c.to(square).view(-1, *[1] * (square.ndim - 1))
    root = (square + c * c) ** 0.5 - c
    if kind == "huber":
        return 2 * c * root
    if kind == "smooth_l1":
        return 2 * root
    raise OptionError(f"loss must be 'l2', 'huber' or 'smooth_l1', got {kind!r}", option="kind", given=kind)
