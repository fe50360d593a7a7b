"""Hard concrete gates: stretched and clamped binary concrete variables, and the probability that they are open."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MARGIN = 1e-4
"""Uniform samples are clamped to MARGIN … 1 − MARGIN, so that their logits are finite."""


def logistic_noise(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """log u − log(1 − u) with u uniform, on the device of the generator."""
    u = torch.rand(shape, generator=generator, device=generator.device, dtype=dtype).clamp_(MARGIN, 1 - MARGIN)
    return u.log() - (1 - u).log()


def sampled_gate(logits: Tensor, noise: Tensor, lower: float, upper: float) -> Tensor:
    """z = min(1, max(0, σ(a + noise)·(upper − lower) + lower)), 0 to 1; its gradient is 0 where it is clamped.

    Args:
        logits: a. `noise`: of `logistic_noise`. `lower`, `upper`: interval that σ is stretched to, below 0 and above 1.
    Source: Louizos, Welling, Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, equations 10 and 11.
    """
    return (torch.sigmoid(logits + noise) * (upper - lower) + lower).clamp(0, 1)


def deterministic_gate(logits: Tensor, lower: float, upper: float) -> Tensor:
    """z without noise, equation 13. Its gradient ignores the clamp, so that it reaches every gate."""
    stretched = torch.sigmoid(logits) * (upper - lower) + lower
    return stretched.detach().clamp(0, 1) + (stretched - stretched.detach())


def open_probability(logits: Tensor, lower: float, upper: float) -> Tensor:
    """P(z > 0) = σ(a − log(−lower / upper)), equation 12."""
    return torch.sigmoid(logits - math.log(-lower / upper))
