"""The training loop against the same explicit steps, and its events."""

import math

import pytest
import torch
from torch import nn

from tests.raising import raises
from veneer.training.loop.config import TrainConfig
from veneer.training.loop.distributed import split_rows
from veneer.training.loop.errors import TrainError
from veneer.training.loop.seeds import generator
from veneer.training.loop.trainer import Trainer

BASE = {"steps": 6, "learning_rate": 0.05, "max_grad_norm": 0.0, "tracker": "none", "weight_decay": 0.0}


def example(step, row):
    draw = generator("example", step, row)
    return torch.randn(3, generator=draw), torch.randn(1, generator=draw)


def loss_of(layer, step, rows):
    x, y = (torch.stack(parts) for parts in zip(*(example(step, row) for row in rows), strict=True))
    return nn.functional.mse_loss(layer(x), y)


def layer_of():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def trainer_of(layer, config, **options):
    groups = [{"params": list(layer.parameters())}]
    return Trainer(config, groups, lambda s, r: loss_of(layer, s, r), dict(layer.named_parameters()), **options)


def weights_after(**changes):
    layer = layer_of()
    result = trainer_of(layer, TrainConfig(**{**BASE, **changes})).fit()
    return torch.cat([p.detach().flatten() for p in layer.parameters()]), result


def by_hand(config, samples):
    """The same run in plain torch: one batch, gradient clipped to `config.max_grad_norm`, SGD with momentum 0.9, the schedule."""
    layer = layer_of()
    velocity = [torch.zeros_like(p) for p in layer.parameters()]
    for step in range(config.steps):
        gradients = torch.autograd.grad(loss_of(layer, step, list(range(samples))), list(layer.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        factor = min(1.0, config.max_grad_norm / norm.item()) if config.max_grad_norm else 1.0
        with torch.no_grad():
            for p, v, g in zip(layer.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g * factor)
                p.sub_(v * config.learning_rate * config.rate(step))
    return torch.cat([p.detach().flatten() for p in layer.parameters()])


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.3}, {"schedule": "cosine", "warmup": 2}, {"schedule": "linear"}])
def test_a_run_equals_plain_torch(changes):
    config = TrainConfig(**{**BASE, "optimizer": "sgd", "batch": 4, **changes})
    weights, _ = weights_after(optimizer="sgd", batch=4, **changes)
    torch.testing.assert_close(weights, by_hand(config, 4))


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 3), (1, 12), (6, 2)])
def test_accumulation_equals_a_big_batch(batch, accumulation):
    big, whole = weights_after(batch=12)
    small, parts = weights_after(batch=batch, gradient_accumulation_steps=accumulation)
    torch.testing.assert_close(small, big)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_shares_of_processes_are_all_rows_once():
    for samples, batch, processes in [(5, 5, 2), (12, 4, 3), (1, 1, 2), (7, 3, 1)]:
        parts = [split_rows(samples, batch, rank, processes) for rank in range(processes)]
        assert [row for own in parts for rows in own for row in rows] == list(range(samples))
        assert all(len(rows) <= math.ceil(batch / processes) for own in parts for rows in own)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]), ("cosine", [0.5, 1, 1, 0.75, 0.25])],
)
def test_schedule(schedule, expected):
    config = TrainConfig(steps=5, warmup=2, schedule=schedule)
    assert [config.rate(step) for step in range(5)] == pytest.approx(expected)


def test_losses_are_those_of_each_step_and_the_model_learns():
    layer, seen = layer_of(), []
    config = TrainConfig(**{**BASE, "steps": 60, "batch": 8})

    def loss_step(step, rows):
        x = torch.stack([example(step, row)[0] for row in rows])
        loss = nn.functional.mse_loss(layer(x), x.sum(1, keepdim=True))
        seen.append(loss.item())
        return loss

    result = Trainer(config, [{"params": list(layer.parameters())}], loss_step, dict(layer.named_parameters())).fit()
    assert result.losses == pytest.approx(seen)
    assert result.losses[-1] < 0.1 * result.losses[0]


def test_average_is_in_place_in_previews_and_after():
    layer = layer_of()
    history, previews = [], {}
    trainer = trainer_of(
        layer,
        TrainConfig(**{**BASE, "ema": 0.5, "preview_every": 3}),
        on_step=lambda event: history.append(layer.weight.detach().clone()),
        on_preview=lambda step: previews.update({step: layer.weight.detach().clone()}),
    )
    trainer.fit()
    average = history[0]
    for step, weight in enumerate(history[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        if step == 2:
            torch.testing.assert_close(previews[3], average)
    assert set(previews) == {3, 6}
    assert torch.equal(layer.weight.detach(), history[-1])
    with trainer.averaged():
        torch.testing.assert_close(layer.weight.detach(), average)


def test_events_have_step_rate_and_norm():
    layer, events = layer_of(), []
    config = TrainConfig(**{**BASE, "warmup": 3, "max_grad_norm": 1e-6})
    gradients = torch.autograd.grad(loss_of(layer, 0, [0]), list(layer.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    result = trainer_of(layer, config, on_step=events.append).fit()
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.learning_rate for event in events[:4]] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.05])
    assert events[0].gradient_norm == pytest.approx(norm)  # before clipping
    assert [event.loss for event in events] == result.losses
    assert events[-1].smoothed == pytest.approx(sum(result.losses) / 6)
    assert events[0].seconds_left is None
    assert events[-1].seconds_left == 0
    assert result.peak_memory_bytes > 2**20


def test_stop_from_a_callback_saves_and_resumes(tmp_path):
    config, whole, part, rest = TrainConfig(**BASE), layer_of(), layer_of(), layer_of()
    trainer_of(whole, config).fit()
    trainer = trainer_of(part, config, folder=tmp_path)
    trainer.on_step = lambda event: trainer.stop() if event.step == 1 else None
    stopped = trainer.fit()
    assert stopped.stopped
    assert 1 <= stopped.steps < 6
    assert stopped.checkpoint == tmp_path / f"checkpoint-{stopped.steps:06d}"
    ended = trainer_of(rest, config, folder=tmp_path).fit(resume=True)
    assert (ended.resumed_from, ended.steps, ended.stopped) == (stopped.steps, 6, False)
    assert len(ended.losses) == 6
    assert torch.equal(rest.weight, whole.weight)


def test_bf16_keeps_float32_weights():
    weights, result = weights_after(mixed_precision="bf16", batch=4)
    exact, _ = weights_after(batch=4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, exact, rtol=0.1, atol=0.05)
    assert not torch.equal(weights, exact)
    assert all(map(math.isfinite, result.losses))


def test_tensors_that_cannot_be_trained_are_errors():
    layer = layer_of()
    loss = lambda s, r: loss_of(layer, s, r)  # noqa: E731
    groups = [{"params": list(layer.parameters())}]
    with raises(TrainError, where="parameter 1", given=(1,)):
        Trainer(TrainConfig(**BASE), groups, loss, {"weight": layer.weight})
    half = layer_of().half()
    with raises(TrainError, where="weight", given=(torch.float16, True), expected=(torch.float32, True)):
        Trainer(TrainConfig(**BASE), [{"params": list(half.parameters())}], loss, dict(half.named_parameters()))
    wrong = Trainer(TrainConfig(**BASE), groups, lambda s, r: layer(torch.ones(2, 3)), dict(layer.named_parameters()))
    with raises(TrainError, where="loss_step", given=((2, 1), True)):
        wrong.fit()


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("schedule", "cosin"), ("ema", 1.0), ("learning_rate", math.nan)],
)
def test_settings_out_of_range(name, value):
    with raises(TrainError, where=name, given=value):
        TrainConfig(**{name: value})
