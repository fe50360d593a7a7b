"""Classification metrics: accuracy with its confidence interval, recall of each class, calibration error."""

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
class ClassificationMetrics:
    """Metrics of a classifier on a set of images.

    Args:
        accuracy: top-1 accuracy. `interval`: its Wilson score interval at 95 %, valid for few images and near 1 too.
        calibration_error: expected calibration error, 15 bins of equal width.
        loss: mean cross-entropy.
        recall: of each class; None without images of the class.
        confusion: counts by (true, predicted) class.
        images: number of images.
    """

    accuracy: float
    interval: tuple[float, float]
    calibration_error: float
    loss: float
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    images: int

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """The metrics as JSON values, with recall by class name."""
        return {
            "accuracy": self.accuracy,
            "interval_95": list(self.interval),
            "calibration_error": self.calibration_error,
            "loss": self.loss,
            "recall": dict(zip(classes, self.recall, strict=True)),
            "confusion": [list(row) for row in self.confusion],
            "pictures": self.images,
        }


def compute_metrics(logits: Tensor, labels: Tensor) -> ClassificationMetrics:
    """Metrics of logits (N, K) and labels (N,)."""
    classes, logits = logits.shape[1], logits.double()
    predictions = logits.argmax(1)
    correct = int((predictions == labels).sum())
    confusion = torch.zeros(classes, classes, dtype=torch.long).index_put_(
        (labels, predictions), torch.ones(len(labels), dtype=torch.long), accumulate=True
    )
    totals, hits = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    return ClassificationMetrics(
        correct / len(labels),
        wilson(correct, len(labels)),
        calibration_error(logits.softmax(1), labels),
        float(torch.nn.functional.cross_entropy(logits, labels)),
        tuple(h / n if n else None for h, n in zip(hits, totals, strict=True)),
        tuple(tuple(row) for row in confusion.tolist()),
        len(labels),
    )


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval at 95 %: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    p, square = correct / n, Z * Z / n
    center, half = p + square / 2, Z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    return max(0.0, (center - half) / (1 + square)), min(1.0, (center + half) / (1 + square))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: Σ over bins of confidence: fraction of images · |accuracy − mean confidence|.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3; 15 bins as there.
    """
    confidence, predictions = probabilities.max(1)
    correct = (predictions == labels).to(confidence.dtype)
    bin_index = (confidence * bins).ceil().long().clamp(1, bins)  # bins are open below: (0, 1/15], …
    total = 0.0
    for number in range(1, bins + 1):
        inside = bin_index == number
        if inside.any():
            total += float((correct[inside].mean() - confidence[inside].mean()).abs() * inside.sum())
    return total / len(labels)
