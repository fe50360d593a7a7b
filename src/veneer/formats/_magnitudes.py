"""DoRA's magnitudes: files hold m, veneer's dora holds m − ‖W‖; the base's own weight stands between the two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..injection import VeneerError
from ..injection.forms import base_tensor
from ..injection.ledger import peek
from ..injection.sites import WeightSite


def magnitude_delta(magnitude: Tensor, weight: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """m − ‖W‖ per output, for a file's m; where a row of W is zero, m / ‖s·B A‖ − 1, as `dora` scales such a row by 1 + it.

    Reckoned in double precision, because m and ‖W‖ are nearly alike.

    Args:
        magnitude: m, d_out numbers in any shape. `weight`: W, (d_out, …), the base's own.
        up, down, scaling: B (d_out, rank, …), A (rank, …) and s of the same layer.
    Returns:
        (d_out,).
    """
    before, after = _norms(weight, up, down, scaling)
    m = magnitude.detach().flatten().to(before)
    return torch.where(before > 0, m - before, torch.where(after > 0, m / after, 1.0) - 1).to(torch.float32)


def magnitude(delta: Tensor, weight: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """m per output, (d_out,): what `magnitude_delta` is the inverse of."""
    before, after = _norms(weight, up, down, scaling)
    given = delta.detach().flatten().to(before)
    return torch.where(before > 0, before + given, (1 + given) * after).to(torch.float32)


def base_weight(tower: nn.Module, site: WeightSite) -> Tensor:
    """The base's own (slice of a) weight, without any adapter.

    Raises:
        VeneerError: it is quantised, or something is merged into it, so that its norm is not the base's.
    """
    ledger = peek(tower)
    if ledger is not None and ledger.merged:
        raise VeneerError(
            f"'{site.name}': '{ledger.merged[-1].name}' is merged into the base, whose norms DoRA's magnitudes are told by. Call "
            "its unmerge() first."
        )
    weight = base_tensor(tower, site.path, site.param).detach()
    if not weight.is_floating_point():
        raise VeneerError(f"'{site.name}': the norm of a quantised weight is not known. Load the base unquantised.")
    return weight if site.rows is None else weight[slice(*site.rows)]


def _norms(weight: Tensor, up: Tensor, down: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """‖W‖ per output, and ‖s·B A‖ where that is zero (elsewhere 0)."""
    before = torch.linalg.vector_norm(weight.detach().double().flatten(1), dim=1)
    after = torch.zeros_like(before)
    empty = before == 0
    if not weight.is_meta and empty.any():
        change = up.detach().to(before).flatten(1)[empty] @ down.detach().to(before).flatten(1)
        after[empty] = torch.linalg.vector_norm(scaling * change, dim=1)
    return before, after
