"""Classification metrics: accuracy with its confidence interval, recall of each class, calibration error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives.objective import Baseline

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
        top5: share of the images whose class is among the five most probable; None with five classes or fewer.
        macro_f1: mean over classes of 2 TP / (2 TP + FP + FN), of those that occur or are predicted.
        auc: area under the ROC curve, mean over classes of each against the rest; None if a class has no images.
    """

    accuracy: float
    interval: tuple[float, float]
    calibration_error: float
    loss: float
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    images: int
    top5: float | None = None
    macro_f1: float = 0.0
    auc: float | None = None

    @property
    def score(self) -> float:
        """Accuracy, the metric that selects the epoch."""
        return self.accuracy

    def baseline(self) -> Baseline:
        """The better of chance and always predicting the most frequent class."""
        counts = [sum(row) for row in self.confusion]
        frequent, chance = max(counts) / self.images, 1 / len(counts)
        low, high = self.interval
        return Baseline(
            max(frequent, chance),
            f"Test accuracy is {self.accuracy:.1%} [{low:.1%}, {high:.1%}]; the most frequent class gives {frequent:.1%}, "
            f"chance {chance:.1%}.",
            "The test accuracy is not clearly above always predicting the most frequent class.",
        )

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """The metrics as JSON values, with recall by class name."""
        return {
            "accuracy": self.accuracy,
            "interval_95": list(self.interval),
            "calibration_error": self.calibration_error,
            "loss": self.loss,
            "top5_accuracy": self.top5,
            "macro_f1": self.macro_f1,
            "auc": self.auc,
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
        float((logits.topk(5).indices == labels[:, None]).any(1).double().mean()) if classes > 5 else None,
        _macro_f1(confusion),
        _auc(logits.softmax(1), labels) if min(totals) > 0 else None,
    )


def _macro_f1(confusion: Tensor) -> float:
    hits, seen = confusion.diagonal().double(), (confusion.sum(0) + confusion.sum(1)).double()
    return float((2 * hits / seen)[seen > 0].mean())


def _auc(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over classes of the area under the ROC curve of p_c: the share of pairs that it orders correctly."""
    from sklearn.metrics import roc_auc_score

    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(probabilities.shape[1])]
    return float(sum(areas) / len(areas))


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
