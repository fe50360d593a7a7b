"""Training and evaluation mode of optimizers that keep other weights for evaluation, such as Schedule-Free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def has_modes(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """True if the optimizer, or its class, has `train()` and `eval()`, which change the parameters."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def start_training(optimizer: torch.optim.Optimizer) -> None:
    """Sets the training mode, in which gradients are computed; no effect for other optimizers."""
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def end_training(optimizer: torch.optim.Optimizer) -> None:
    """Sets the evaluation mode at the end of a run; no effect for other optimizers."""
    if has_modes(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Context manager: the parameters have the weights for evaluation. On exit they are restored bitwise.

    Nested use has no effect.

    Args:
        parameters: those of the optimizer. They are copied, because `train()` computes them from the weights for evaluation with
            rounding.
    """
    if not has_modes(optimizer) or not optimizer.param_groups[0].get("train_mode", True):
        yield
        return
    copies = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
