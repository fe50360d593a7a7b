"""Selection of the rank of ΔW by its singular values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.injection.errors import OptionError

RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "energy": ("above 0 and up to 1", lambda x: 0 < x <= 1),
    "error": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "cumulative": ("above 0 and up to 1", lambda x: 0 < x <= 1),
    "ratio": ("above 1", lambda x: x > 1),
}
KINDS = tuple(RANGES)


@dataclass(frozen=True)
class RankSelection:
    """The rank of each weight's ΔW: a number, or the least rank that meets one condition on the singular values σ.

    Args:
        rank: the rank, at least 1; with a condition the upper limit.
        energy: fraction of Σσ² = ‖ΔW‖² to keep, above 0, up to 1.
        error: upper limit of ‖ΔW − ΔW'‖ / ‖ΔW‖, 0 to 1; equivalent to energy = 1 − error².
        cumulative: fraction of Σσ to keep, above 0, up to 1.
        ratio: singular values above σ1 / ratio are kept; above 1.
    A grouped convolution has factors for each group; all groups have the same rank, selected by √Σσ² over the groups.
    Source: sd-scripts `networks/resize_lora.py`: sv_ratio is `ratio`, sv_cumulative is `cumulative`, sv_fro f is energy = f².
    Raises:
        ValueError: no condition, two conditions, or one out of range.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    cumulative: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1 or (not given and self.rank is None):
            message = (
                f"rank selection: {' and '.join(given) or 'nothing'} given; expected rank, one of {', '.join(KINDS)}, or both"
            )
            raise OptionError(message, option="keep", method="keep", given=tuple(given), expected=("rank", *KINDS))
        if self.rank is not None and self.rank < 1:
            raise OptionError.of("keep", "rank", self.rank, "at least 1")
        for kind in given:
            value, expected, is_valid = getattr(self, kind), *RANGES[kind]
            if not is_valid(value):
                raise OptionError.of("keep", kind, value, expected)

    def holds(self, rank: int) -> bool:
        """True if ΔW of this rank is kept unchanged, whatever its singular values."""
        return self.rank is not None and rank <= self.rank and all(getattr(self, kind) is None for kind in KINDS)

    def count(self, sigma: Tensor) -> int:
        """Number of singular values of each group to keep, at least one, without zeros.

        Args:
            sigma: (groups, n), descending.
        """
        size = torch.linalg.vector_norm(sigma.double(), dim=0)
        found = int((size > size[0] * len(size) * torch.finfo(torch.float64).eps).sum())
        if self.energy is not None or self.error is not None:
            share = self.error**2 if self.error is not None else 1 - (self.energy or 0)
            found = min(found, _least(size.square(), share))
        if self.cumulative is not None:
            found = min(found, _least(size, 1 - self.cumulative))
        if self.ratio is not None:
            found = int((size > size[0] / self.ratio).sum())
        if self.rank is not None:
            found = min(found, self.rank // len(sigma))
        return max(1, found)


def _least(parts: Tensor, share: float) -> int:
    """The least k for which the sum of parts[k:] is at most `share` of the total; summed from the smallest."""
    rest = parts.flip(0).cumsum(0).flip(0)
    return int((rest > (share + 1e-12) * rest[0]).sum())  # 1 − 0.8 is slightly less than 0.2 in floating point


def to_rank_selection(keep: RankSelection | int) -> RankSelection:
    """Converts a rank to a `RankSelection`."""
    return RankSelection(rank=keep) if isinstance(keep, int) else keep


def rank_selection_of(
    rank: int | None, energy: float | None, error: float | None, cumulative: float | None, ratio: float | None
) -> RankSelection | None:
    """A `RankSelection` of the given options, or None without any option."""
    given = (rank, energy, error, cumulative, ratio)
    return None if given == (None,) * len(given) else RankSelection(*given)
