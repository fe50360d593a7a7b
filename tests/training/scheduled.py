"""A run whose methods have a penalty, an `after_step` and remembered buffers, for the tests of exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, attach, hosts
from veneer.methods.reparameterized.low_rank.adalora import AdaLoRA
from veneer.training import param_groups
from veneer.training.loop.seeds import generator
from veneer.training.loop.trainer import TrainConfig, Trainer

METHOD = AdaLoRA(rank=4, target_rank=2, warmup=0.2, final=0.3, every=2)
STEPS = 12  # pruned after steps 4, 6 and 8


def tuned(dropout: float = 0.0) -> tuple[nn.Module, list[Attachment]]:
    """AdaLoRA, a LoRA initialized from the weights, Delta-LoRA and Bi-LoRA on a small ViT."""
    torch.manual_seed(0)
    model = hosts.get("timm_vit")().tiny()["vit"]()
    attached = [
        attach(model, METHOD, where="attn.{q,v} mlp.out", name="ranks"),
        attach(model, "lora", rank=2, init="pissa", dropout=dropout, where="mlp.in", name="part"),
        attach(model, "delta_lora", rank=2, warmup=0.25, where="attn.out", name="moved"),  # from step 4 on
        attach(model, "bi_lora", rank=2, dropout=0.0, where="attn.k", name="bits"),
    ]
    return model.train(), attached


def scheduled_trainer(
    folder: Path | None, config: TrainConfig, dropout: float = 0.0, watch: Callable[[], None] = lambda: None
) -> Trainer:
    """The tuned model learns to give numbers."""
    model, attached = tuned(dropout)

    def loss_step(step: int, rows: list[int]) -> Tensor:
        watch()
        draws = [generator(config.seed, step, row) for row in rows]
        images = torch.stack([torch.randn(3, 32, 32, generator=draw) for draw in draws])
        wanted = torch.stack([torch.randn(10, generator=draw) for draw in draws])
        return nn.functional.mse_loss(model(images), wanted)

    named = param_groups.named_state(attached)
    groups = param_groups.parameter_groups(attached, {"adalora": 1.0, "lora": 0.5, "delta_lora": 0.5, "bi_lora": 0.5}, 0.0, 1.0)
    loss = param_groups.add_penalties(loss_step, attached)
    return Trainer(config, groups, loss, named, folder, after_step=param_groups.after_step(attached))
