"""Per-sample losses with weights and masks, and their mean over photos and class pictures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection.errors import OptionError

Kind = Literal["l2", "huber", "smooth_l1"]
MaskMean = Literal["plain", "normalised"]


def loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    is_prior: Tensor,
    prior_weight: float = 1.0,
    *,
    kind: Kind = "l2",
    huber_c: float | Tensor = 0.1,
    mask_mean: MaskMean = "plain",
    mask_floor: float = 0.0,
    totals: tuple[int, int] | None = None,
) -> Tensor:
    """L = mean over photos of ℓ + λ · mean over class pictures of ℓ, with ℓ from `sample_losses`: a scalar.

    Args:
        is_prior: (batch,), bool: True for class pictures. `prior_weight`: λ.
        others: see `sample_losses` and `preserved`.
    Source: Ruiz et al., CVPR 2023 (DreamBooth), equation 2.
    """
    losses = sample_losses(
        prediction, target, weight, mask, kind=kind, huber_c=huber_c, mask_mean=mask_mean, mask_floor=mask_floor
    )
    return preserved(losses, is_prior, prior_weight, totals)


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: Kind = "l2",
    huber_c: float | Tensor = 0.1,
    mask_mean: MaskMean = "plain",
    mask_floor: float = 0.0,
) -> Tensor:
    """ℓ_i = w_i · mean(m_i · d(prediction_i, target_i)) in float32, (batch,).

    Args:
        prediction, target: (batch, channels, height, width).
        weight: (batch,), or None for 1.
        mask: (batch, 1, H, W) in [0, 1] of any size, shrunk to the latents by area; None for everywhere.
        kind: d: `l2` (p − t)²; `huber` 2c(√((p − t)² + c²) − c); `smooth_l1` 2(√((p − t)² + c²) − c).
        huber_c: c, a number or (batch,).
        mask_mean: `plain` divides by the number of elements, so that a small mask makes a small loss (kohya sd-scripts);
            `normalised` divides by Σm (Mix-of-Show). An empty mask gives 0 in both.
        mask_floor: f; the mask becomes f + (1 − f)·m, so that what lies outside still counts a little.
    Raises:
        OptionError: for another `kind` or `mask_mean`, or shapes that differ.
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
        elif mask_mean == "normalised":
            total = area.flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
            losses = (distance * area).flatten(1).sum(1) / total
        else:
            raise OptionError(
                f"mask_mean must be 'plain' or 'normalised', got {mask_mean!r}", option="mask_mean", given=mask_mean
            )
    return losses if weight is None else losses * weight.to(losses)


def preserved(losses: Tensor, is_prior: Tensor, prior_weight: float = 1.0, totals: tuple[int, int] | None = None) -> Tensor:
    """Σ ℓ over photos / n + λ · Σ ℓ over class pictures / m: a scalar; a group without members adds 0.

    Args:
        losses: (batch,). `is_prior`: (batch,), bool.
        totals: (n, m); None to count this batch. Give the counts of the whole step where it is spread over processes or
            accumulated: the parts then sum to what one batch would give.
    """
    prior = is_prior.to(losses.device, torch.bool)
    n, m = totals if totals is not None else (int((~prior).sum()), int(prior.sum()))
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
