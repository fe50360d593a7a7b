"""Methods with a penalty and an `after_step`: exact resume after a kill, on two processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.raising import raises
from tests.training.resume_worker import CONFIG, Job
from tests.training.scheduled import METHOD, STEPS, scheduled_trainer
from tests.training.test_resume import Worker, final
from veneer.injection import attach, hosts
from veneer.training import param_groups
from veneer.training.loop.checkpoints import CheckpointError
from veneer.training.loop.trainer import TrainConfig, Trainer

SETTINGS: dict[str, Any] = {"steps": STEPS, "checkpoint_every": 5}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / f"checkpoint-{STEPS:06d}" / "weights.safetensors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks its processes, which this system cannot")
def test_kills_change_nothing_and_two_processes_see_one_gradient(worker: Worker, tmp_path: Path) -> None:
    """Killed in the phase that prunes, with the pruning of step 6 still to come; `final` compares bitwise."""
    for processes in (1, 2):
        whole, killed = tmp_path / f"whole-{processes}", tmp_path / f"killed-{processes}"
        job = {"processes": processes, "config": SETTINGS, "model": "scheduled", "dropout": 0.0}
        assert worker.run(Job(str(whole), **job)) == [0] * processes
        losses = 6 * (2 if processes == 1 else 1)  # two micro-batches a step, and others than losses count as well
        assert -worker.run(Job(str(killed), after=losses + 14, **job))[0] == signal.SIGKILL
        assert [p.name for p in killed.glob("checkpoint-*")] == ["checkpoint-000005"]
        assert worker.run(Job(str(killed), **job)) == [0] * processes
        assert final(killed, STEPS) == final(whole, STEPS)
    one, two = weights(tmp_path / "whole-1"), weights(tmp_path / "whole-2")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    kept = [t for name, t in one.items() if name.endswith(":kept")]
    assert sum(int(t.sum()) for t in kept) == METHOD.target_rank * len(kept)
    assert any(name.startswith("part/") and name.endswith(":down0") for name in one)


@pytest.mark.parametrize("stop", [6, 10])
def test_a_stop_in_each_phase_changes_nothing(stop: int, tmp_path: Path) -> None:
    """While ranks are pruned, and in the final part, in which the choice of step 8 must still be known."""
    config = TrainConfig(**{**CONFIG, **SETTINGS, "checkpoint_every": 0})
    whole, first = scheduled_trainer(None, config), scheduled_trainer(tmp_path, config)
    whole.fit()
    first.on_step = lambda progress: first.stop() if progress.step == stop - 1 else None  # after the one under way
    assert first.fit().stopped
    second = scheduled_trainer(tmp_path, config)
    assert second.fit(resume=True).resumed_from == stop
    assert second.losses == whole.losses
    assert second.named.keys() == whole.named.keys()
    assert [name for name, tensor in whole.named.items() if not torch.equal(second.named[name], tensor)] == []


def test_a_run_of_other_length_is_another_run(tmp_path: Path) -> None:
    """Its schedule would differ from the first step, even with a constant learning rate."""
    settings = {**CONFIG, **SETTINGS, "schedule": "constant"}
    trainer = scheduled_trainer(tmp_path, TrainConfig(**settings))
    trainer.on_step = lambda progress: trainer.stop() if progress.step == 2 else None
    assert trainer.fit().stopped
    with raises(CheckpointError, where="settings", given={"steps": 12}, expected={"steps": 20}):
        scheduled_trainer(tmp_path, TrainConfig(**{**settings, "steps": 20})).fit(resume=True)


def test_the_loss_has_the_methods_terms_once_a_step_and_others_have_none() -> None:
    config = TrainConfig(**{**CONFIG, "steps": 1, "schedule": "constant", "warmup": 0})
    model = hosts.get("timm_vit")().tiny()["vit"]()
    ranks = [attach(model, METHOD, where="attn.q"), attach(model, METHOD, where="attn.v")]
    plain = attach(model, "lora", where="attn.k")
    loss = lambda step, rows: sum((p * 0).sum() for a in ranks for p in a.parameters()) + 0.25  # noqa: E731
    expected = 0.25 + sum(a.penalty().item() for a in ranks)
    named = param_groups.named_state(ranks)
    trainer = Trainer(
        config, param_groups.parameter_groups(ranks, {"adalora": 1.0}, 0, 1.0), param_groups.add_penalties(loss, ranks), named
    )
    assert config.gradient_accumulation_steps == 2
    assert trainer.fit().losses == [pytest.approx(expected, rel=1e-6)]
    assert param_groups.add_penalties(loss, [plain]) is loss
    assert param_groups.after_step([plain]) is None
    assert plain.penalty() is None
    assert param_groups.named_state([plain]).keys() == param_groups.named_parameters([plain]).keys()


def test_after_step_is_called_before_gradients_are_cleared() -> None:
    layer = nn.Linear(2, 1)
    seen: list[Any] = []

    def done(step: int, steps: int) -> None:
        seen.append((step, steps, layer.weight.grad.clone(), layer.weight.detach().clone()))

    def loss(step: int, rows: list[int]) -> torch.Tensor:
        return (layer.weight * (step + 1)).sum()

    config = TrainConfig(steps=3, optimizer="sgd", learning_rate=0.1, weight_decay=0.0, max_grad_norm=0.0, tracker="none")
    before = layer.weight.detach().clone()
    Trainer(config, [{"params": [layer.weight]}], loss, {"weight": layer.weight}, after_step=done).fit()
    assert [s[:2] for s in seen] == [(1, 3), (2, 3), (3, 3)]
    for number, (_, _, grad, _) in enumerate(seen, 1):
        assert torch.equal(grad, torch.full((1, 2), float(number)))
    torch.testing.assert_close(seen[0][3], before - 0.1)  # after the update
    assert layer.weight.grad is None


def test_after_step_has_no_gradients_after_an_fp16_overflow() -> None:
    layer = nn.Linear(2, 1)
    seen: list[bool] = []

    def loss(step: int, rows: list[int]) -> torch.Tensor:
        return (layer.weight * (1e35 if step == 1 else 1.0)).sum()  # times the scale of 65,536 it is no number any more

    config = TrainConfig(steps=3, mixed_precision="fp16", tracker="none")
    tell = lambda step, steps: seen.append(layer.weight.grad is not None)  # noqa: E731
    Trainer(config, [{"params": [layer.weight]}], loss, {"weight": layer.weight}, after_step=tell).fit()
    assert seen == [True, False, True]
