"""LoRA with ranks and alphas by role, its weight updates written out, and those of peft for a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.formats.cases import fill
from veneer.injection import attach
from veneer.testing.pipelines import tiny_pipeline

peft = pytest.importorskip("peft", reason="diffusers loads LoRA through peft")

# ranks and alphas by role, rank-stabilised: nothing of this is in the tensors' names
BY_SITE = {"*.v": {"rank": 5}, "mlp": {"rank": 2}, "*.q": {"alpha": 7.0}}
OPTIONS: dict[str, Any] = {"rank": 3, "alpha": 2.0, "by_site": BY_SITE, "rslora": True}


def tuned(family: str, where: Sequence[str], pipe: Any = None, **options: Any) -> veneer.Attachment:
    if not options:
        mlp = any("mlp" in pattern for pattern in where)
        options = OPTIONS if mlp else {**OPTIONS, "by_site": {k: own for k, own in BY_SITE.items() if k != "mlp"}}
    return fill(attach(pipe or tiny_pipeline(family), "lora", where=where, **options), std=0.2)


def expected(attachment: veneer.Attachment) -> dict[str, Tensor]:
    """ΔW from the tensors and `OPTIONS`, with the rules of the papers written out."""
    found: dict[str, Tensor] = {}
    for name, (site, adapter) in attachment.parts.items():
        down, up = adapter.down.detach().double(), adapter.up.detach().double()
        alpha = 7.0 if site.role.endswith(".q") else 2.0
        found[name] = alpha / down.shape[0] ** 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(site.weight_shape)
    return found


def in_peft(towers: dict[str, Any]) -> dict[str, Tensor]:
    """ΔW of every layer that peft has injected, by site name."""
    found: dict[str, Tensor] = {}
    for component, tower in towers.items():
        for name, module in tower.named_modules() if isinstance(tower, nn.Module) else ():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                (adapter,) = module.lora_A
                found[f"{component}.{name}"] = module.get_delta_weight(adapter).detach().double()
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, delta in want.items():
        assert delta.abs().max() > 1e-3, name
        torch.testing.assert_close(got[name], delta, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
