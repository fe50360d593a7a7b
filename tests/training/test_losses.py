"""Losses against explicit loops over elements."""

import math

import pytest
import torch

from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.training.objective.losses import huber_threshold, prior_preservation, sample_losses

G = torch.Generator().manual_seed(0)
P, Y = torch.randn(4, 3, 2, 6, generator=G), torch.randn(4, 3, 2, 6, generator=G)
MASK = torch.rand(4, 1, 4, 12, generator=G)  # two mask pixels to a latent, each way
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.1])
C = [0.1, 0.2, 0.3, 0.9]


def distance(kind, p, y, c):
    if kind == "l2":
        return (p - y) ** 2
    root = math.sqrt((p - y) ** 2 + c * c) - c
    return 2 * c * root if kind == "huber" else 2 * root


def reference(kind, mask_mean, floor):
    losses = []
    for i in range(4):
        total, area = 0.0, 0.0
        for ch in range(3):
            for y in range(2):
                for x in range(6):
                    cells = [float(MASK[i, 0, 2 * y + a, 2 * x + b]) for a in (0, 1) for b in (0, 1)]
                    m = floor + (1 - floor) * sum(cells) / 4
                    total += m * distance(kind, float(P[i, ch, y, x]), float(Y[i, ch, y, x]), C[i])
                    area += m
        losses.append(float(WEIGHT[i]) * total / (36 if mask_mean == "plain" else area))
    return losses


@pytest.mark.parametrize("kind", ["l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("mask_mean", ["plain", "normalized"])
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_masked_and_weighted(kind, mask_mean, floor):
    got = sample_losses(P, Y, WEIGHT, MASK, kind=kind, huber_c=torch.tensor(C), mask_mean=mask_mean, mask_floor=floor)
    assert got.tolist() == pytest.approx(reference(kind, mask_mean, floor), rel=1e-5)


def test_without_mask_l2_is_the_mean_square():
    got = sample_losses(P, Y)
    torch.testing.assert_close(got, torch.stack([torch.nn.functional.mse_loss(p, y) for p, y in zip(P, Y, strict=True)]))
    assert sample_losses(P, Y, mask=torch.ones(4, 1, 7, 7)).tolist() == pytest.approx(got.tolist())


def test_an_empty_mask_gives_zero_and_finite_gradients():
    p = P.clone().requires_grad_()
    for mask_mean in ("plain", "normalized"):
        total = sample_losses(p, Y, mask=torch.zeros(4, 1, 4, 12), mask_mean=mask_mean).sum()
        total.backward()
        assert float(total.detach()) == 0.0
    assert torch.equal(p.grad, torch.zeros_like(P))


def test_huber_is_smooth_where_prediction_equals_target():
    p = Y.clone().requires_grad_()
    sample_losses(p, Y, kind="huber").sum().backward()
    assert torch.equal(p.grad, torch.zeros_like(Y))


def test_prior_preservation():
    prior = torch.tensor([False, True, False, True])
    mse = [float(((P[i] - Y[i]) ** 2).mean()) for i in range(4)]
    expected = (mse[0] + mse[2]) / 2 + 0.7 * (mse[1] + mse[3]) / 2
    got = prior_preservation(sample_losses(P, Y), prior, 0.7)
    assert got.ndim == 0
    assert float(got) == pytest.approx(expected)


def test_prior_preservation_with_groups_of_different_size_or_none():
    losses = torch.tensor([1.0, 2.0, 6.0, 10.0])
    assert float(prior_preservation(losses, torch.tensor([False, False, False, True]), 0.5)) == pytest.approx(3.0 + 5.0)
    assert float(prior_preservation(losses, torch.zeros(4, dtype=torch.bool), 0.5)) == pytest.approx(4.75)
    assert float(prior_preservation(losses, torch.ones(4, dtype=torch.bool), 0.5)) == pytest.approx(0.5 * 4.75)


def test_huber_threshold():
    for snr in (1e-3, 1.0, 50.0):
        assert float(huber_threshold(torch.tensor(snr), 0.1)) == pytest.approx(0.9 / (1 + snr**-0.5) ** 2 + 0.1)
    assert float(huber_threshold(torch.tensor(0.0), 0.1)) == pytest.approx(0.1, abs=1e-6)


def test_bad_arguments():
    with raises(OptionError, option="kind", given="l3"):
        sample_losses(P, Y, kind="l3")
    with raises(OptionError, option="mask_mean", given="sum"):
        sample_losses(P, Y, mask=MASK, mask_mean="sum")
    with raises(OptionError, option="prediction", given=tuple(P.shape), expected=tuple(Y[:, :2].shape)):
        sample_losses(P, Y[:, :2])
