"""Figures of a classifier: accuracy with its interval, recall of each class, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Z = 1.959963984540054
"""The normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class Figures:
    """What a classifier does on some pictures.

    Args:
        accuracy: share of right answers. `interval`: Wilson's 95 % interval of it, which holds for few pictures and near 1.
        calibration_error: expected calibration error, 15 bins of equal width.
        loss: mean cross-entropy.
        recall: of each class; None for a class without pictures.
        confusion: (true, answered) counts.
        pictures: how many there were.
    """

    accuracy: float
    interval: tuple[float, float]
    calibration_error: float
    loss: float
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    pictures: int

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """As JSON values, with recalls by class."""
        return {
            "accuracy": self.accuracy,
            "interval_95": list(self.interval),
            "calibration_error": self.calibration_error,
            "loss": self.loss,
            "recall": dict(zip(classes, self.recall, strict=True)),
            "confusion": [list(row) for row in self.confusion],
            "pictures": self.pictures,
        }


def figures_of(logits: Tensor, labels: Tensor) -> Figures:
    """Figures from logits (N, K) and labels (N,)."""
    classes, logits = logits.shape[1], logits.double()
    answers = logits.argmax(1)
    right = int((answers == labels).sum())
    confusion = torch.zeros(classes, classes, dtype=torch.long).index_put_(
        (labels, answers), torch.ones(len(labels), dtype=torch.long), accumulate=True
    )
    held, hits = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    return Figures(
        right / len(labels),
        wilson(right, len(labels)),
        calibration_error(logits.softmax(1), labels),
        float(torch.nn.functional.cross_entropy(logits, labels)),
        tuple(h / n if n else None for h, n in zip(hits, held, strict=True)),
        tuple(tuple(row) for row in confusion.tolist()),
        len(labels),
    )


def wilson(right: int, of: int) -> tuple[float, float]:
    """Wilson's score interval at 95 %: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    share, square = right / of, Z * Z / of
    middle, half = share + square / 2, Z * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Σ over bins of confidence: share of pictures · |accuracy − mean confidence|.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3; 15 bins as there.
    """
    confidence, answers = probabilities.max(1)
    right = (answers == labels).to(confidence.dtype)
    place = (confidence * bins).ceil().long().clamp(1, bins)  # bins are open below: (0, 1/15], …
    total = 0.0
    for number in range(1, bins + 1):
        inside = place == number
        if inside.any():
            total += float((right[inside].mean() - confidence[inside].mean()).abs() * inside.sum())
    return total / len(labels)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of it by Student's t; infinite for one value."""
    from scipy.stats import t

    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
