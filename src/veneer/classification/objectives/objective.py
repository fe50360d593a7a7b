"""Base class of single-label and multi-label classification: targets, loss, metrics and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Baseline:
    """Score of predictions that do not look at the images.

    Args:
        value: the score. `reason`: sentence that compares the run's score with it.
        summary: sentence for a run that is not better.
    """

    value: float
    reason: str
    summary: str


class Metrics(Protocol):
    """Metrics of a classifier on a set of images.

    Attributes:
        score: the metric that selects the epoch: accuracy, or mean average precision. `interval`: its 95 % interval.
        loss: mean loss without label smoothing or weights.
        images: number of images.
    """

    @property
    def score(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def loss(self) -> float: ...
    @property
    def images(self) -> int: ...

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """The metrics as JSON values."""
        ...

    def baseline(self) -> Baseline:
        """Score of predictions that do not look at the images."""
        ...


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image file.

    Args:
        image: path of the image. `label`, `probability`: of the most probable class.
        others: the next classes, with their probabilities.
        problem: why the image could not be read, or "".
    """

    image: str
    label: str = ""
    probability: float = 0.0
    others: tuple[tuple[str, float], ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class MultiLabelPrediction(Prediction):
    """Prediction for one image file that may have several labels.

    Args:
        labels: every class with a probability of at least 0.5, most probable first, with its probability.
    """

    labels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Predictions on the test split, for plots.

    Args:
        logits, targets: of the images. `classes`: their names. `image`: returns the image of a row.
    """

    logits: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    image: Callable[[int], Image.Image]


class Objective(ABC):
    """Targets, loss, metrics and predictions of a kind of classification.

    Attributes:
        multiple: whether an image may have several labels.
        metric: name of the metric that selects the epoch. `short`: for tables. `key`: of its values in `result.json`.
        image_metric: name of `image_scores`; "" for accuracy.
        metadata: entries of exported models.
        plot: file of the plot with one row per class.
    """

    multiple: ClassVar[bool]
    metric: ClassVar[str]
    short: ClassVar[str]
    key: ClassVar[str]
    image_metric: ClassVar[str]
    metadata: ClassVar[Mapping[str, str]]
    plot: ClassVar[str]

    @abstractmethod
    def targets(self, labels: Sequence[Sequence[int]], classes: int) -> Tensor:
        """Targets of images, one row each, from the indices of their classes."""

    @abstractmethod
    def class_weights(self, targets: Tensor, classes: int) -> Tensor:
        """Weights (classes,) for `class_weights=balanced`."""

    @abstractmethod
    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        image_weights: Tensor | None = None,
    ) -> Tensor:
        """Mean loss of images.

        Args:
            logits: (N, classes). `smoothing`: label smoothing. `image_weights`: (N,), of mixed images.
        """

    @abstractmethod
    def divergence(self, logits: Tensor, others: Tensor) -> Tensor:
        """Symmetric KL divergence of two predictions of each image, (N,), from logits (N, classes)."""

    @abstractmethod
    def metrics(self, logits: Tensor, targets: Tensor) -> Metrics:
        """Metrics of logits (N, classes)."""

    @abstractmethod
    def image_scores(self, logits: Tensor, targets: Tensor) -> list[float]:
        """A score of each image, 0 to 1, whose differences between two models are compared in pairs."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each class, (N, classes)."""

    @abstractmethod
    def prediction(self, image: str, probabilities: Tensor, classes: Sequence[str], top: int) -> Prediction:
        """Prediction of an image from the probabilities (classes,). `top`: classes that are listed."""

    @abstractmethod
    def write_plots(self, evaluation: Evaluation, metrics: Metrics, out: Path) -> None:
        """Writes the plot of the classes and `mistakes.png`."""


def most_probable(probabilities: Tensor, classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The `top` most probable classes with their probabilities."""
    best = probabilities.topk(min(top, len(probabilities)))
    return [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
