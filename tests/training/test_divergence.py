"""The first loss or gradient that is not finite ends a run; the last good weights are restored, and the error has the step."""

import math

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.raising import carries, raises
from veneer.training.loop.divergence import Diverged
from veneer.training.loop.trainer import TrainConfig, Trainer

SETTINGS = {"steps": 10, "learning_rate": 0.1, "optimizer": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0, "tracker": "none"}


def trained(loss_of, folder=None, **changes):
    """(trainer, its weight, the weight before each step)."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    seen = []

    def loss_step(step, rows):
        if len(seen) <= step:
            seen.append(weight.detach().clone())
        return loss_of(step, weight)

    config = TrainConfig(**{**SETTINGS, **changes})
    return Trainer(config, [{"params": [weight]}], loss_step, {"weight": weight}, folder), weight, seen


def bad_at(bad, value):
    return lambda step, weight: weight.square().sum() * (value if step == bad else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stops_at_the_first_loss_that_is_not_finite(value, tmp_path):
    """The loss of step 3 is not finite after the third update, so the weights of step 2 are restored."""
    trainer, weight, seen = trained(bad_at(3, value), tmp_path, checkpoint_every=1)
    with pytest.raises(Diverged) as caught:
        trainer.fit()
    assert str(caught.value.given) == str(value)
    carries(caught.value, step=3, where="loss", restored_step=2, learning_rate=0.1, file=tmp_path / "last_good.safetensors")
    assert torch.equal(weight, seen[2])
    assert len(seen) == 4
    assert torch.equal(safetensors.torch.load_file(caught.value.file)["weight"], seen[2])
    assert caught.value.checkpoint == tmp_path / "checkpoint-000003"


def test_a_gradient_that_is_not_finite_updates_nothing():
    """sqrt at 0: the loss is finite, its gradient is not."""
    trainer, weight, seen = trained(lambda step, w: (w * 0).sum().sqrt() if step == 2 else w.square().sum())
    with raises(Diverged, step=2, where="gradient", restored_step=2, file=None) as caught:
        trainer.fit()
    assert not math.isfinite(caught.value.given)
    assert torch.equal(weight, seen[2])


def test_a_diverging_learning_rate_ends_with_finite_weights(tmp_path):
    trainer, weight, _ = trained(bad_at(-1, 1.0), tmp_path, steps=2000, learning_rate=50.0)
    with raises(Diverged, learning_rate=50.0):
        trainer.fit()
    assert weight.isfinite().all()


def test_averages_go_back_with_the_weights():
    trainer, weight, seen = trained(bad_at(1, math.nan), ema=0.9)
    with pytest.raises(Diverged):
        trainer.fit()
    with trainer.averaged():
        assert torch.equal(weight, seen[0])


def test_a_first_loss_that_is_not_finite_keeps_the_start():
    trainer, weight, _ = trained(bad_at(0, math.nan))
    with raises(Diverged, step=0, restored_step=0):
        trainer.fit()
    assert torch.equal(weight.detach(), torch.tensor([1.0, 2.0]))
