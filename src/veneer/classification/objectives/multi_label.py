"""Multi-label classification: any number of classes per image, a sigmoid and binary cross-entropy for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from veneer.training.objective.consistency import symmetric_binary_kl

from .multi_label_metrics import THRESHOLD, MultiLabelMetrics, image_ranking_precision
from .multi_label_plots import write_class_precision, write_label_mistakes
from .objective import Evaluation, Metrics, MultiLabelPrediction, Objective, most_probable


class MultiLabel(Objective):
    """Targets are t in {0, 1}, (N, classes), float32.

        loss = − mean over images and classes of w_c t' log σ(z) + (1 − t') log(1 − σ(z))        t' = (1 − s) t + s / 2

    with logits z, label smoothing s and weights w of positive targets: 1, or for balanced classes (N − n_c) / n_c of a class
    with n_c of N images, so that its images and the others have the same weight. mixup and CutMix mix targets, because the loss
    is linear in t'.

    Source: torch's `BCEWithLogitsLoss`, with w as its `pos_weight`; the smoothing is that of Szegedy et al., CVPR 2016, for the
    two outcomes of each class.
    """

    multiple: ClassVar[bool] = True
    metric: ClassVar[str] = "mean average precision"
    short: ClassVar[str] = "mAP"
    key: ClassVar[str] = "map"
    image_metric: ClassVar[str] = "label ranking average precision"
    metadata: ClassVar[Mapping[str, str]] = {"problem_type": "multi_label_classification", "activation": "sigmoid"}
    plot: ClassVar[str] = "average_precision.png"

    def targets(self, labels: Sequence[Sequence[int]], classes: int) -> Tensor:
        targets = torch.zeros(len(labels), classes)
        for row, of_image in zip(targets, labels, strict=True):
            row[list(of_image)] = 1.0
        return targets

    def class_weights(self, targets: Tensor, classes: int) -> Tensor:
        """(N − n_c) / n_c; 1 for a class of all images or of none."""
        positives = targets.sum(0)
        negatives = len(targets) - positives
        return torch.where((positives > 0) & (negatives > 0), negatives / positives.clamp(min=1), 1.0)

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        image_weights: Tensor | None = None,
    ) -> Tensor:
        weights = None if image_weights is None else image_weights[:, None]
        smoothed = (1 - smoothing) * targets + smoothing / 2
        return binary_cross_entropy_with_logits(logits, smoothed, weights, pos_weight=class_weights)

    def divergence(self, logits: Tensor, others: Tensor) -> Tensor:
        return symmetric_binary_kl(logits, others)

    def metrics(self, logits: Tensor, targets: Tensor) -> MultiLabelMetrics:
        return MultiLabelMetrics(logits, targets)

    def image_scores(self, logits: Tensor, targets: Tensor) -> list[float]:
        """Average precision of the image's labels in the ranking of its classes."""
        return image_ranking_precision(logits, targets)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def prediction(self, image: str, probabilities: Tensor, classes: Sequence[str], top: int) -> MultiLabelPrediction:
        ranking = most_probable(probabilities, classes, len(classes))
        labels = tuple((name, probability) for name, probability in ranking if probability >= THRESHOLD)
        return MultiLabelPrediction(image, *ranking[0], others=tuple(ranking[1:top]), labels=labels)

    def write_plots(self, evaluation: Evaluation, metrics: Metrics, out: Path) -> None:
        write_class_precision(cast(MultiLabelMetrics, metrics), evaluation.classes, out / self.plot)
        write_label_mistakes(evaluation, out / "mistakes.png")


MULTI_LABEL = MultiLabel()


def objective_of(multi_label: bool) -> Objective:
    """The objective of images with one label, or with any number of them."""
    from .single_label import SINGLE_LABEL

    return MULTI_LABEL if multi_label else SINGLE_LABEL
