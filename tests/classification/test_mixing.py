"""mixup, CutMix and class weights against explicit formulas."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from veneer.classification.train.batches import ClassifyingLoss, Order, balanced_weights
from veneer.classification.train.mixing import Mixing

IMAGES = torch.rand(8, 3, 12, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])


def loss_of(mixing: Mixing | None, weights: Tensor | None = None, smoothing: float = 0.0) -> tuple[ClassifyingLoss, nn.Module]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(360, 3))

    def inputs(samples: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        places = [place for _, place in samples]
        return IMAGES[places], LABELS[places]

    loss = ClassifyingLoss(
        model, inputs, Order(range(8), 5), samples=6, smoothing=smoothing, class_weights=weights, mixing=mixing
    )
    return loss, model


def places(loss: ClassifyingLoss, step: int) -> list[int]:
    return [loss.order.at(6 * step + row)[1] for row in range(6)]


def test_mixup_is_the_convex_combination_of_images_and_losses() -> None:
    mixing = Mixing(mixup=0.4, seed=7)
    loss, model = loss_of(mixing, smoothing=0.1)
    order = places(loss, 2)
    partners = [order[row ^ 1] for row in range(6)]
    images, weights = mixing(IMAGES[order], IMAGES[partners], 2, range(6))
    expected = torch.zeros(())
    for row in range(6):
        x = weights[row] * IMAGES[order[row]] + (1 - weights[row]) * IMAGES[partners[row]]
        torch.testing.assert_close(images[row], x)
        logs = model(x[None]).log_softmax(1)[0]
        for label, share in ((LABELS[order[row]], weights[row]), (LABELS[partners[row]], 1 - weights[row])):
            target = torch.full((3,), 0.1 / 3)
            target[label] += 0.9
            expected = expected - share * (target * logs).sum() / 6
    torch.testing.assert_close(loss(2, list(range(6))), expected)
    assert weights[0] == weights[1] != weights[2]


def test_cutmix_replaces_a_box_and_weights_by_its_area() -> None:
    others = IMAGES[[1, 0, 3, 2, 5, 4, 7, 6]]
    cut = 0
    for step in range(20):
        images, weights = Mixing(cutmix=1.0, seed=1)(IMAGES, others, step, range(8))
        for row in range(8):
            taken = (images[row] == others[row]).all(0)
            kept = (images[row] == IMAGES[row]).all(0)
            assert bool((taken | kept).all())
            assert float(weights[row]) == pytest.approx(1 - taken.float().mean().item())
            rows, columns = taken.any(1).nonzero(), taken.any(0).nonzero()
            if len(rows):
                cut += 1
                box = taken[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                assert bool(box.all()), "one rectangle"
    assert cut > 100


def test_with_both_each_pair_gets_one_of_them() -> None:
    images, _ = Mixing(mixup=1.0, cutmix=1.0, seed=2)(IMAGES.repeat(20, 1, 1, 1), 1 - IMAGES.repeat(20, 1, 1, 1), 0, range(160))
    whole = [bool(((a == b) | (a == 1 - b)).all()) for a, b in zip(images, IMAGES.repeat(20, 1, 1, 1), strict=True)]
    assert 0.3 < sum(whole) / 160 < 0.7
    assert whole[::2] == whole[1::2]


def test_the_split_into_parts_does_not_change_the_mixed_images() -> None:
    """Two processes compute what one computes, also where a pair is divided."""
    loss, _ = loss_of(Mixing(mixup=0.4, cutmix=1.0, seed=7), balanced_weights(LABELS.tolist(), 3))
    whole = loss(1, list(range(6)))
    parts = (3 * loss(1, [0, 1, 2]) + 3 * loss(1, [3, 4, 5])) / 6
    torch.testing.assert_close(whole, parts)


def test_the_last_of_an_odd_number_is_not_mixed() -> None:
    assert [Mixing.partner(row, 5) for row in range(5)] == [1, 0, 3, 2, 4]


def test_weighted_loss_is_the_mean_of_the_weighted_losses() -> None:
    weights = balanced_weights(LABELS.tolist(), 4)
    assert weights.tolist() == pytest.approx([8 / 16, 8 / 8, 8 / 8, 0])
    assert float(weights[LABELS].sum()) == pytest.approx(8 * 3 / 4)
    loss, model = loss_of(None, weights[:3])
    order = places(loss, 0)
    logs = model(IMAGES[order]).log_softmax(1)
    expected = -(weights[LABELS[order]] * logs[range(6), LABELS[order]]).mean()
    torch.testing.assert_close(loss(0, list(range(6))), expected)
