"""Order of samples, and the loss against an explicit cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.classification.train.batches import ClassifyingLoss, Order, logits_of


def test_each_epoch_permutes_all_images() -> None:
    order = Order([3, 5, 8, 9, 11, 20], seed=4)
    epochs = [[order.at(6 * e + i) for i in range(6)] for e in range(3)]
    for number, seen in enumerate(epochs):
        assert {e for e, _ in seen} == {number}
        assert sorted(p for _, p in seen) == [3, 5, 8, 9, 11, 20]
    assert len({tuple(p for _, p in seen) for seen in epochs}) == 3
    assert order.at(2) == epochs[0][2], "again after later epochs"
    assert [Order([3, 5, 8, 9, 11, 20], seed=5).at(i) for i in range(6)] != epochs[0]


def test_loss_is_label_smoothed_cross_entropy() -> None:
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(9) % 3
    head = nn.Linear(4, 3)
    order, prefetched = Order(range(9), seed=1), list[tuple[int, int]]()

    def inputs(samples: object) -> tuple[Tensor, Tensor]:
        places = torch.tensor([p for _, p in samples])  # type: ignore[attr-defined]
        return features[places], truth[places]

    loss = ClassifyingLoss(head, inputs, order, samples=4, prefetch=prefetched.extend, smoothing=0.1)
    got = loss(2, [1, 3])
    places = [order.at(9)[1], order.at(11)[1]]
    logs = head(features[places]).log_softmax(1)
    target = torch.full((2, 3), 0.1 / 3)
    target[range(2), truth[places]] += 0.9
    assert torch.allclose(got, -(target * logs).sum(1).mean())
    assert prefetched == [order.at(n) for n in (9, 11, 13, 15)], "samples of this step and the next"


def test_logits_of_runs_in_eval_mode_and_restores_modes() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2))
    model.train()
    inputs = torch.ones(4, 2)
    logits, labels = logits_of(
        model, [(inputs[:3], torch.tensor([0, 1, 0])), (inputs[3:], torch.tensor([1]))], torch.device("cpu")
    )
    torch.testing.assert_close(logits, model[1](inputs))  # in batches of 3 and 1: other matrix kernels than for 4 rows
    assert labels.tolist() == [0, 1, 0, 1]
    assert model[0].training
