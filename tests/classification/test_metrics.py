"""Classification metrics against hand-computed values, scikit-learn and scipy."""

from __future__ import annotations

import math

import pytest
import torch

from veneer.classification.report.metrics import calibration_error, compute_metrics, wilson
from veneer.training.report.metrics import mean_interval


def test_accuracy_recall_and_confusion_match_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, f1_score, log_loss, recall_score

    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 4, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    metrics = compute_metrics(logits, labels)
    answers = logits.argmax(1)
    assert metrics.accuracy == float((answers == labels).double().mean())
    assert [list(row) for row in metrics.confusion] == confusion_matrix(labels, answers, labels=range(4)).tolist()
    assert metrics.recall[:3] == pytest.approx(recall_score(labels, answers, labels=range(3), average=None))
    assert metrics.recall[3] is None, "a class without images has no recall"
    assert metrics.loss == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(4)))
    assert metrics.as_dict("abcd")["recall"]["d"] is None
    assert metrics.macro_f1 == pytest.approx(f1_score(labels, answers, average="macro"))
    assert metrics.auc is None, "a class has no images"
    assert metrics.top5 is None, "there are four classes"


def test_top_five_and_auc_match_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score, top_k_accuracy_score

    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(300, 9, generator=generator), torch.randint(0, 9, (300,), generator=generator)
    logits[range(300), labels] += 1
    metrics = compute_metrics(logits, labels)
    shares = logits.double().softmax(1)
    assert metrics.auc == pytest.approx(roc_auc_score(labels, shares, multi_class="ovr", average="macro"))
    assert metrics.top5 == pytest.approx(top_k_accuracy_score(labels, shares, k=5))
    assert metrics.as_dict("abcdefghi")["top5_accuracy"] == metrics.top5


@pytest.mark.parametrize(("right", "of"), [(0, 10), (10, 10), (3, 7), (311, 372), (1, 1)])
def test_wilson_interval_matches_scipy(right: int, of: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(right, of).proportion_ci(method="wilson")
    assert wilson(right, of) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_calibration_error() -> None:
    # two bins: confidence 0.75 four times with three right, confidence 0.55 twice with none right
    shares = torch.tensor([[0.75, 0.25]] * 4 + [[0.55, 0.45]] * 2, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert calibration_error(shares, labels) == pytest.approx((4 * abs(0.75 - 0.75) + 2 * abs(0 - 0.55)) / 6)


def test_calibration_bins_include_their_upper_edge() -> None:
    # 1/3 = 5/15 ends the fifth bin; 0.34 begins in the sixth. In one bin their errors would cancel.
    third = 1 / 3
    shares = torch.tensor([[third, third, third], [0.34, 0.33, 0.33]], dtype=torch.float64)
    apart = calibration_error(shares, torch.tensor([0, 1]))
    assert apart == pytest.approx((abs(1 - third) + abs(0 - 0.34)) / 2, abs=1e-6)


def test_mean_interval_matches_scipy() -> None:
    from scipy import stats

    values = [0.8, 0.83, 0.78]
    mean, half = mean_interval(values).mean, mean_interval(values).half
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert (mean_interval([0.5]).mean, mean_interval([0.5]).half) == (0.5, math.inf)
