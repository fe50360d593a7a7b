"""Patterns of attention maps: vertical, diagonal, both, block, heterogeneous."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = ("vertical", "diagonal", "vertical+diagonal", "block", "heterogeneous")
THRESHOLD = 0.25
"""Part of the attention, beyond that of equal attention, from which a pattern counts."""


@dataclass(frozen=True)
class HeadPattern:
    """How a head attends, as attention beyond that of equal attention: 0 for equal attention, 1 for nothing else.

    Args:
        vertical: to class and register tokens, or to the single token that is read most.
        diagonal: of patches to themselves and adjacent patches. `block`: of patches to patches within a quarter of the grid.
        name: one of `PATTERNS`.
    """

    vertical: float
    diagonal: float
    block: float
    name: str


def pattern_of(attention: Tensor, prefix_tokens: int = 0, grid: tuple[int, int] | None = None) -> HeadPattern:
    """The pattern of one head.

    A part p of the attention, which equal attention would have with e, counts (p − e) / (1 − e). Vertical and diagonal need
    0.25 each; a map with neither is a block from 0.25 on, else heterogeneous.

    Args:
        attention: (queries, keys), rows sum to 1; the mean over images.
        prefix_tokens: tokens before the patches. `grid`: (height, width) of the patches; None for a sequence, or keys of text.
    Source: Kovaleva et al., Revealing the Dark Secrets of BERT, EMNLP 2019, section 4.1. Deviations: there a network trained on
    annotated maps classifies, here thresholds; distances are in the grid of patches, not between positions in a text; a block
    is a neighborhood, not a sentence.
    """
    keys = attention.shape[-1]
    column = attention.mean(-2)
    vertical = _beyond(float(column.max()), 1 / keys)
    if prefix_tokens:
        vertical = max(vertical, _beyond(float(column[:prefix_tokens].sum()), prefix_tokens / keys))
    distance = _distances(attention, prefix_tokens, grid)
    if distance is None:
        return HeadPattern(vertical, 0.0, 0.0, "vertical" if vertical >= THRESHOLD else "heterogeneous")
    patches, rows = attention[prefix_tokens:, prefix_tokens:], attention.shape[-2] - prefix_tokens
    near, wide = distance <= 1, distance <= max(2, math.ceil(distance.max().item() / 4))
    diagonal, block = (_beyond(float((patches * mask).sum() / rows), float(mask.sum() / rows) / keys) for mask in (near, wide))
    return HeadPattern(vertical, diagonal, block, _name(vertical, diagonal, block))


def _name(vertical: float, diagonal: float, block: float) -> str:
    if vertical >= THRESHOLD and diagonal >= THRESHOLD:
        return "vertical+diagonal"
    scores = {"vertical": vertical, "diagonal": diagonal, "block": block}
    return next((name for name, score in scores.items() if score >= THRESHOLD), "heterogeneous")


def _beyond(part: float, equal: float) -> float:
    return (part - equal) / (1 - equal) if equal < 1 else 0.0


def _distances(attention: Tensor, prefix_tokens: int, grid: tuple[int, int] | None) -> Tensor | None:
    """The larger of the distances in rows and in columns between patches, (n, n); None if keys are other tokens than queries."""
    queries, keys = attention.shape[-2:]
    if queries != keys:
        return None
    count = queries - prefix_tokens
    height, width = _size(count, grid)
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(attention.device)
    return (positions[:, None] - positions[None]).abs().amax(-1)


def _size(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the patches: of the grid, of a square window in it, or of a sequence."""
    if grid is None:
        return 1, count
    side = math.isqrt(count)
    return grid if grid[0] * grid[1] == count else (side, side) if side * side == count else (1, count)
