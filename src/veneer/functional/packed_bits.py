"""Booleans stored as bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pack_bits(kept: Tensor) -> Tensor:
    """Booleans as bytes (⌈n / 8⌉,), the first one in the lowest bit."""
    flat = nn.functional.pad(kept.flatten().to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` booleans of `pack_bits`."""
    return ((packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten()[:count].bool()
