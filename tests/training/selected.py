"""A run of methods that select the entries they train, and of one with random masks, for the tests of exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from veneer.injection import Attachment, attach, hosts
from veneer.training import param_groups
from veneer.training.adapter_trainer import adapter_trainer
from veneer.training.loop.seeds import generator
from veneer.training.loop.trainer import TrainConfig, Trainer


def tuned() -> tuple[nn.Module, list[Attachment]]:
    """FISH mask, both modes of Child-Tuning and a LoRA initialized from inputs on parts of a small ViT."""
    torch.manual_seed(0)
    model = hosts.get("timm_vit")().tiny()["vit"]()
    attached = [
        attach(model, "fish_mask", keep_ratio=0.1, samples=6, where="attn.{q,v}"),
        attach(model, "child_tuning", keep_ratio=0.2, samples=4, batch=2, where="mlp.out", name="d"),
        attach(model, "child_tuning", mode="F", where="mlp.in", name="f"),
        attach(model, "lora", init="eva", rank=2, eva_samples=3, where="attn.out", name="eva"),
    ]
    return model.train(), attached


def selected_trainer(
    folder: Path | None,
    config: TrainConfig,
    dropout: float = 0.0,
    watch: Callable[[], None] = lambda: None,
    seen: list[tuple[int, list[int]]] | None = None,
) -> Trainer:
    """The tuned model learns to give numbers. `seen` gets the step and the rows of each loss."""
    model, attached = tuned()

    def loss_step(step: int, rows: list[int]) -> Tensor:
        watch()
        if seen is not None:
            seen.append((step, rows))
        draws = [generator(config.seed, step, row) for row in rows]
        images = torch.stack([torch.randn(3, 32, 32, generator=draw) for draw in draws])
        wanted = torch.stack([torch.randn(10, generator=draw) for draw in draws])
        return nn.functional.mse_loss(model(images), wanted)

    rates = {"fish_mask": 1.0, "child_tuning": 0.5, "lora": 0.5}
    return adapter_trainer(
        attached, loss_step, config, param_groups.parameter_groups(attached, rates, 0.0, 1.0), folder, identity={},
        accelerator=Accelerator(), on_preview=lambda step: None, on_step=None,
    )  # fmt: skip
