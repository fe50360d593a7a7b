"""Principal components of rows that are read batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class PrincipalComponents:
    """The largest principal components of all rows so far, by an incremental singular value decomposition of the centered rows.

    Exact if all components are kept; otherwise an approximation, because the smaller ones are dropped after each batch.

    Args:
        count: number of components to keep, at least 1.
    Attributes:
        vectors: (at most count, width), orthonormal rows. `ratios`: part of the variance that each explains, in descending order.
    Source: Ross et al., Incremental Learning for Robust Visual Tracking, IJCV 2008, as in scikit-learn's `IncrementalPCA`.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, 0
        self.vectors = self.values = self.mean = self.squares = torch.zeros(())

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Adds rows, (n, width), in float32 or better."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        n, mean = len(rows), rows.mean(0)
        stacked = rows - mean
        self.squares = self.squares.to(rows) + stacked.square().sum()
        if self.seen:
            shift = (self.seen * n / (self.seen + n)) ** 0.5 * (self.mean - mean)
            self.squares = self.squares + shift.square().sum()
            stacked = torch.cat([self.values[:, None] * self.vectors, stacked, shift[None]])
            mean = self.mean + (mean - self.mean) * (n / (self.seen + n))
        if len(stacked) > stacked.shape[1]:
            stacked = torch.linalg.qr(stacked, mode="r").R  # the same singular values and right vectors
        _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
        self.values, self.vectors, self.mean = values[: self.count], vectors[: self.count], mean
        self.seen += n

    @property
    def ratios(self) -> Tensor:
        """Squared singular values, relative to all squares of the centered rows."""
        return self.values.square() / self.squares
