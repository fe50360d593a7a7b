"""How much of a change stays when its rank is cut."""

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
class Keep:
    """The rank of each weight's change: a number, or the least that fulfils one condition on the singular values σ.

    Args:
        rank: the largest rank, at least 1; with a condition its upper limit.
        energy: share of Σσ², that is of ‖ΔW‖², above 0, up to 1.
        error: ‖ΔW − ΔW'‖ / ‖ΔW‖ at most, 0 to 1; the same as energy = 1 − error².
        cumulative: share of Σσ, above 0, up to 1.
        ratio: σ1 / σ of what stays is below it, above 1.
    A grouped convolution has a pair for each group; all its groups keep equally many, judged by √Σσ² over the groups.
    Source: sd-scripts `networks/resize_lora.py`: sv_ratio is `ratio`, sv_cumulative is `cumulative`, sv_fro f is energy = f².
    Raises:
        ValueError: nothing, or two conditions, or one out of its range.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    cumulative: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1 or (not given and self.rank is None):
            message = f"keep: {' and '.join(given) or 'nothing'} given; give rank, one of {', '.join(KINDS)}, or both"
            raise OptionError(message, option="keep", method="keep", given=tuple(given), expected=("rank", *KINDS))
        if self.rank is not None and self.rank < 1:
            raise OptionError.of("keep", "rank", self.rank, "at least 1")
        for kind in given:
            value, told, fits = getattr(self, kind), *RANGES[kind]
            if not fits(value):
                raise OptionError.of("keep", kind, value, told)

    def holds(self, rank: int) -> bool:
        """True if a change of this rank stays whole, whatever its singular values."""
        return self.rank is not None and rank <= self.rank and all(getattr(self, kind) is None for kind in KINDS)

    def count(self, sigma: Tensor) -> int:
        """How many singular values of each group stay, at least one, and no zeros.

        Args:
            sigma: (groups, n), falling.
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
    """The least k for which parts[k:] are together at most `share` of all; summed from the small ones."""
    rest = parts.flip(0).cumsum(0).flip(0)
    return int((rest > (share + 1e-12) * rest[0]).sum())  # 1 − 0.8 is a little less than 0.2


def as_keep(keep: Keep | int) -> Keep:
    """A rank alone as a `Keep`."""
    return Keep(rank=keep) if isinstance(keep, int) else keep


def keep_of(
    rank: int | None, energy: float | None, error: float | None, cumulative: float | None, ratio: float | None
) -> Keep | None:
    """A `Keep` of what is given, or None where nothing is."""
    given = (rank, energy, error, cumulative, ratio)
    return None if given == (None,) * len(given) else Keep(*given)
