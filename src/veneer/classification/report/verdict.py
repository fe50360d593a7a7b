"""The verdict of a classification run: test accuracy against trivial baselines, and training against validation accuracy.

The baselines are chance (1 / classes), the share of the most frequent class, and a linear probe on the frozen features, on
the same test images. An accuracy is better than a share if its whole Wilson interval is above it; the run is better or worse than
the probe if the whole 95 % interval of the paired difference says so. Of images with several labels, the metric is the mean
average precision, chance is that of a random ranking, and the probe is compared by the label ranking average precision.

| outcome | when |
|---|---|
| `not_learned` | the interval of the test accuracy is not above the most frequent class and chance |
| `overfitted` | it is worse than the probe, and training accuracy is above validation accuracy, interval above interval |
| `partly` | it is worse than the probe without that gap |
| `learned` | everything else |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import linear

from veneer.training.report.metrics import mean_interval
from veneer.training.report.verdict import Verdict

from ..objectives.objective import Metrics
from ..train.batches import logits_of

if TYPE_CHECKING:
    from ..config import TransferConfig
    from ..train.train import ClassifierTrainer

TRAIN_IMAGES = 200
"""Training images that are evaluated, or as many as there are validation images."""


@dataclass(frozen=True)
class Evidence:
    """The metrics that the verdict is computed from.

    Args:
        test, validation: metrics of the run. `train`: of training images without augmentation, or None.
        probe: for each test image 1 if the linear probe is right, else 0; None if there is no probe, or the run is one. With
            several labels, `Objective.image_scores`.
        right: the same for the run.
        metric: name of the metric. `probe_metric`: that of the comparison with the probe.
    """

    test: Metrics
    validation: Metrics
    train: Metrics | None = None
    probe: Sequence[float] | None = None
    right: Sequence[float] | None = None
    metric: str = "accuracy"
    probe_metric: str = ""


def evidence_of(trainer: ClassifierTrainer, test: tuple[Tensor, Tensor], validation: Metrics) -> Evidence:
    """Evaluates what the verdict needs beyond the run's metrics: some training images, and the linear probe on the test images.

    Args:
        test: logits (N, K) and targets of the test images.
    """
    objective = trainer.views.data.objective
    right, probe = objective.image_scores(*test), _probe_scores(trainer)
    metrics = objective.metrics(*test), validation, _train_metrics(trainer)
    return Evidence(*metrics, probe, right, objective.metric, objective.image_metric)


def _train_metrics(trainer: ClassifierTrainer) -> Metrics:
    objective = trainer.views.data.objective
    splits, device = trainer.views.data.splits, trainer.accelerator.device
    every = max(1, len(splits.train) // max(TRAIN_IMAGES, len(splits.validation)))
    indices = splits.train[::every]
    if trainer.features is not None:
        batch = trainer.features([(0, index) for index in indices])
        return objective.metrics(*logits_of(trainer.features.head, [batch], device, trainer.dtype))
    batches = trainer.views.plain.batches(indices, trainer.config.batch)
    return objective.metrics(*logits_of(trainer.model, batches, device, trainer.dtype))


def _probe_scores(trainer: ClassifierTrainer) -> list[float] | None:
    """Score of each test image of a logistic regression on the frozen features.

    None if the run trains only a head, or the model has no features or no pretrained weights.
    """
    classifier, site = trainer.classifier, trainer.classifier.features
    if trainer.features is not None or site is None or not site.head or not classifier.fresh or classifier.weights == "random":
        return None
    weight, bias = trainer.probe_head()
    x, y = trainer.frozen_features("test")
    return trainer.views.data.objective.image_scores(linear(x, weight, bias), y)


def verdict(evidence: Evidence, config: TransferConfig) -> Verdict:
    """The verdict of a finished run; `config` for the advice."""
    baseline = evidence.test.baseline()
    reasons = [baseline.reason]
    against, gap = _against_probe(evidence), _gap(evidence)
    reasons += [line for line in (against[1], gap[1]) if line]
    if evidence.test.interval[0] <= baseline.value:
        return Verdict("not_learned", baseline.summary, tuple(reasons), _advice(config, gap[0]))
    if against[0] < 0 and gap[0]:
        summary = "It fits the training images and is worse than a linear probe on new ones."
        return Verdict("overfitted", summary, tuple(reasons), (*_less(config), "train less: --method linear_probe"))
    if against[0] < 0:
        summary = "It tells the classes apart, but a linear probe does better."
        more = () if config.lp_ft else ("initialize the head with a linear probe: --lp-ft",)
        advice = (_longer(config), *more, "train the head only: --method linear_probe")
        return Verdict("partly", summary, tuple(reasons), advice)
    beyond = ", and better than a linear probe" if against[0] > 0 else ""
    advice = _less(config) if gap[0] else ()
    return Verdict("learned", f"It tells the classes apart{beyond}.", tuple(reasons), advice)


def _against_probe(evidence: Evidence) -> tuple[int, str]:
    """1 if better than the probe, −1 if worse, 0 if that may be chance or is unknown; and the sentence."""
    if evidence.probe is None or evidence.right is None:
        return 0, ""
    gain = mean_interval([a - b for a, b in zip(evidence.right, evidence.probe, strict=True)])
    share = sum(evidence.probe) / len(evidence.probe)
    sign = 0 if gain.low is None or gain.high is None else 1 if gain.low > 0 else -1 if gain.high < 0 else 0
    measure = f" {evidence.probe_metric}" if evidence.probe_metric else ""
    return sign, f"A linear probe on the frozen model gives {share:.1%}{measure}: difference {gain}."


def _gap(evidence: Evidence) -> tuple[bool, str]:
    """Whether training is clearly above validation, and the sentence."""
    train, validation = evidence.train, evidence.validation
    if train is None:
        return False, ""
    apart = train.interval[0] > validation.interval[1]
    name = evidence.metric
    return apart, f"Training {name} is {train.score:.1%}, validation {name} {validation.score:.1%}."


def _advice(config: TransferConfig, gap: bool) -> tuple[str, ...]:
    if gap:
        return (*_less(config), "give more images of each class")
    pretrained = "a pretrained model: --model vit_small_patch16_224.augreg_in21k_ft_in1k"
    offline = "" if config.model == "bundled_clip" else ", or --model bundled_clip without network access"
    return _longer(config), f"a lower learning rate: --learning-rate {config.rate() / 3:.2g}", pretrained + offline


def _longer(config: TransferConfig) -> str:
    """At least the default number of epochs."""
    return f"train longer: --epochs {max(type(config).epochs, 2 * config.epochs)}"


def _less(config: TransferConfig) -> tuple[str, ...]:
    found = ["augment more: --augment strong"] if config.augment != "strong" else []
    return (*found, f"a lower learning rate: --learning-rate {config.rate() / 3:.2g}")
