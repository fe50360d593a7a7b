"""Single-label classification: one class per image, softmax and cross-entropy, selection by accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from veneer.training.objective.consistency import symmetric_kl

from ..report.metrics import ClassificationMetrics, compute_metrics
from ..report.plots import write_confusion, write_mistakes
from .objective import Evaluation, Metrics, Objective, Prediction, most_probable


class SingleLabel(Objective):
    """Targets are class indices (N,), int64.

    The loss is the mean over images of w[y] · CE(logits, y), with weights w of the classes if there are any. Label smoothing
    spreads its share of the target over all classes.
    """

    multiple: ClassVar[bool] = False
    metric: ClassVar[str] = "accuracy"
    short: ClassVar[str] = "accuracy"
    key: ClassVar[str] = "accuracy"
    image_metric: ClassVar[str] = ""
    metadata: ClassVar[Mapping[str, str]] = {}
    plot: ClassVar[str] = "confusion.png"

    def targets(self, labels: Sequence[Sequence[int]], classes: int) -> Tensor:
        return torch.tensor([label for label, *_ in labels])

    def class_weights(self, targets: Tensor, classes: int) -> Tensor:
        return balanced_weights(targets.tolist(), classes)

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        image_weights: Tensor | None = None,
    ) -> Tensor:
        if image_weights is None and class_weights is None:
            return cross_entropy(logits, targets, label_smoothing=smoothing)
        each = cross_entropy(logits, targets, class_weights, label_smoothing=smoothing, reduction="none")
        return (each if image_weights is None else image_weights * each).mean()

    def divergence(self, logits: Tensor, others: Tensor) -> Tensor:
        return symmetric_kl(logits, others)

    def metrics(self, logits: Tensor, targets: Tensor) -> ClassificationMetrics:
        return compute_metrics(logits, targets)

    def image_scores(self, logits: Tensor, targets: Tensor) -> list[float]:
        """1 for a correct prediction, else 0."""
        return (logits.argmax(1) == targets).int().tolist()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def prediction(self, image: str, probabilities: Tensor, classes: Sequence[str], top: int) -> Prediction:
        best = most_probable(probabilities, classes, top)
        return Prediction(image, *best[0], others=tuple(best[1:]))

    def write_plots(self, evaluation: Evaluation, metrics: Metrics, out: Path) -> None:
        write_confusion(cast(ClassificationMetrics, metrics), evaluation.classes, out / self.plot)
        write_mistakes(evaluation.logits, evaluation.targets, evaluation.classes, evaluation.image, out / "mistakes.png")


def balanced_weights(labels: Iterable[int], classes: int) -> Tensor:
    """Weights N / (K n_c) of K classes with n_c of N images, (K,): every class counts the same. 0 for a class without images."""
    counts = torch.bincount(torch.as_tensor(list(labels)), minlength=classes).float()
    return torch.where(counts > 0, counts.sum() / (classes * counts.clamp(min=1)), 0.0)


SINGLE_LABEL = SingleLabel()
