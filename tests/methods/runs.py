"""Runs of a method by the trainer on a small ViT, for tests of schedules and of exact resume."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from tests.training.resume_worker import CONFIG
from veneer.injection import attach
from veneer.injection.method import Method
from veneer.training import param_groups
from veneer.training.loop.trainer import TrainConfig, Trainer
from veneer.training.objective.forward_passes import ForwardPasses

DEPTH, STEPS = 5, 12


def vit() -> nn.Module:
    """A ViT of `DEPTH` blocks, in training mode."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": DEPTH, "num_heads": 2, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape).train()
    return model


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Images and targets of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randn(4, 3, generator=generator)


def trainer(method: Method, folder: Path | None, where: str | None = None) -> Trainer:
    """A run of `STEPS` steps."""
    config = TrainConfig(**{**CONFIG, "steps": STEPS, "checkpoint_every": 0})
    model = vit()
    attached = [attach(model, method, where=where)]
    passes = ForwardPasses(attached, config.seed)

    def loss_step(step: int, rows: list[int]) -> Tensor:
        images, targets = batch_of(step)
        output, _ = passes(step, lambda: model(images[rows]), nn.functional.mse_loss)
        return nn.functional.mse_loss(output, targets[rows])

    groups = param_groups.parameter_groups(attached, {method.name: 1.0}, 0.0, 1.0)
    named = param_groups.named_state(attached)
    loss = param_groups.add_penalties(loss_step, attached)
    return Trainer(config, groups, loss, named, folder, after_step=param_groups.after_step(attached))


def check_resume(method: Method, folder: Path, stop: int, where: str | None = None) -> Trainer:
    """A run that is stopped after step `stop` and resumed is bitwise the whole one. Returns the stopped run."""
    whole, first = trainer(method, None, where), trainer(method, folder, where)
    whole.fit()
    first.on_step = lambda progress: first.stop() if progress.step == stop - 1 else None
    assert first.fit().stopped
    second = trainer(method, folder, where)
    assert second.fit(resume=True).resumed_from == stop
    assert second.losses == whole.losses
    assert [name for name, tensor in whole.named.items() if not torch.equal(second.named[name], tensor)] == []
    return first
