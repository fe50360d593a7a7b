"""Distances of the outputs of two forward passes for each batch row, for consistency losses."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """½ (KL(p ‖ q) + KL(q ‖ p)) of two softmax distributions, (batch,); the first argument of each KL has no gradient.

    Args:
        first, second: logits (batch, classes).
    Source: Wang et al., AdaMix, EMNLP 2022, equation 5, and the authors' code, which detaches the targets.
    """
    return (_kl(first.detach(), second) + _kl(second.detach(), first)) / 2


def symmetric_binary_kl(first: Tensor, second: Tensor) -> Tensor:
    """`symmetric_kl` of independent sigmoid probabilities, averaged over the classes, (batch,).

    Args:
        first, second: logits (batch, classes).
    """
    pairs = [F.logsigmoid(t).unsqueeze(-1) for t in (first, second)], [F.logsigmoid(-t).unsqueeze(-1) for t in (first, second)]
    both = [_join(on, off) for on, off in zip(*pairs, strict=True)]
    return symmetric_kl(*both).flatten(1).mean(1)


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean of (first − second)² for each batch row, (batch,), in float32.

    Args:
        first, second: (batch, …) of equal shapes.
    """
    return (first.float() - second.float()).square().flatten(1).mean(1)


def _kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) over the last dimension; p of `target`."""
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _join(on: Tensor, off: Tensor) -> Tensor:
    """Logits of the two outcomes of each class, (…, 2): log-probabilities are logits of their softmax."""
    return F.pad(on, (0, 1)) + F.pad(off, (1, 0))
