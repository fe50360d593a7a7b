"""Predictions of a batch whose rows need different calls of the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


def predict_by_group(keys: Sequence[Hashable], predict: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The predictions of `predict(key, *inputs)` for the rows of each key, in the order of the batch.

    Args:
        keys: of each row; rows of one key are one call, and a batch of one key has no copies of its inputs.
        inputs: (batch, …) each.
    """
    kinds = list(dict.fromkeys(keys))
    if len(kinds) == 1:
        return predict(kinds[0], *inputs)
    device = inputs[0].device
    groups = [torch.tensor([row for row, key in enumerate(keys) if key == kind], device=device) for kind in kinds]
    parts = [predict(kind, *(each[rows] for each in inputs)) for kind, rows in zip(kinds, groups, strict=True)]
    return torch.cat(parts)[torch.cat(groups).argsort()]
