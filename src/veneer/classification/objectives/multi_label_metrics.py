"""Multi-label metrics: average precision of each class, its mean with an interval, and F1 at a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .objective import Baseline

THRESHOLD = 0.5
"""Probability from which a label is predicted."""
RESAMPLES = 200
"""Bootstrap samples of the interval."""


@dataclass(frozen=True)
class MultiLabelMetrics:
    """Metrics of logits and targets, both (N, classes).

    The average precision of a class is Σ_n (R_n − R_{n−1}) P_n over the distinct scores, as in scikit-learn. The mean is that of
    the classes that have images, its interval the 2.5 % and 97.5 % quantiles of 200 bootstrap samples of the images. F1 is
    2 TP / (2 TP + FP + FN) at a probability of 0.5: micro of the counts of all classes, macro the mean over classes that occur
    or are predicted.
    """

    logits: Tensor = field(repr=False, compare=False)
    targets: Tensor = field(repr=False, compare=False)

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.targets)

    @property
    def score(self) -> float:
        """Mean average precision."""
        return _mean(self.average_precision)

    @cached_property
    def average_precision(self) -> tuple[float | None, ...]:
        """Average precision of each class; None for a class without images."""
        values = average_precision(self.logits, self.targets, torch.ones(1, self.images, dtype=torch.float64))[0]
        return tuple(None if value != value else value for value in values.tolist())

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean average precision."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(self.images, (RESAMPLES, self.images), generator=generator)
        weights = torch.zeros(RESAMPLES, self.images, dtype=torch.float64)
        weights.scatter_add_(1, rows, torch.ones_like(weights))
        means = average_precision(self.logits, self.targets, weights).nanmean(1)
        low, high = torch.quantile(means[~means.isnan()], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    @cached_property
    def loss(self) -> float:
        """Mean binary cross-entropy."""
        return float(binary_cross_entropy_with_logits(self.logits.double(), self.targets.double()))

    @cached_property
    def f1(self) -> tuple[float, float]:
        """Micro and macro F1."""
        predicted, true = self.logits.sigmoid() >= THRESHOLD, self.targets > 0.5
        hits, seen = (predicted & true).sum(0).double(), (predicted.sum(0) + true.sum(0)).double()
        micro = float(2 * hits.sum() / seen.sum()) if seen.sum() else 0.0
        macro = float((2 * hits / seen)[seen > 0].mean()) if seen.sum() else 0.0
        return micro, macro

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """The metrics as JSON values, with the average precision and the number of images by class name."""
        counts = self.targets.sum(0).long().tolist()
        return {
            "map": self.score,
            "interval_95": list(self.interval),
            "micro_f1": self.f1[0],
            "macro_f1": self.f1[1],
            "average_precision": dict(zip(classes, self.average_precision, strict=True)),
            "loss": self.loss,
            "images_of_class": dict(zip(classes, counts, strict=True)),
            "pictures": self.images,
        }

    def baseline(self) -> Baseline:
        """Mean share of the images with each class: the expected average precision of a random ranking."""
        shares = self.targets.double().mean(0)
        chance = float(shares[shares > 0].mean())
        low, high = self.interval
        return Baseline(
            chance,
            f"Test mean average precision is {self.score:.1%} [{low:.1%}, {high:.1%}]; a random ranking gives {chance:.1%}.",
            "The test mean average precision is not clearly above that of a random ranking.",
        )


def average_precision(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Average precision of each class for several weights of the images, (W, classes), float64; NaN without positive images.

    Args:
        scores, targets: (N, classes). `weights`: (W, N), at least 0.
    """
    columns = [
        _class_precision(s, t, weights) for s, t in zip(scores.double().unbind(1), targets.double().unbind(1), strict=True)
    ]
    return torch.stack(columns, 1)


def _class_precision(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ over positive images of the precision at their score, divided by their number, (W,)."""
    order = scores.argsort(descending=True, stable=True)
    negated, weight = -scores[order], weights[:, order]
    positive = weight * targets[order]
    last = torch.searchsorted(negated, negated, right=True) - 1  # equal scores have the precision of the last of them
    precision = positive.cumsum(1)[:, last] / weight.cumsum(1)[:, last].clamp(min=1e-12)
    return (positive * precision).sum(1) / positive.sum(1)


def image_ranking_precision(scores: Tensor, targets: Tensor) -> list[float]:
    """Average precision of each image's labels in the ranking of its classes; 1 for an image without labels.

    Its mean is the label ranking average precision of scikit-learn, except for tied scores.
    """
    values = average_precision(scores.T, targets.T, torch.ones(1, scores.shape[1], dtype=torch.float64))[0]
    return [1.0 if value != value else value for value in values.tolist()]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
