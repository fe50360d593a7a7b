"""A small pipeline with adapters, and their ΔW as dense matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.injection import Attachment, attach
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.testing.pipelines import tiny_pipeline

WHERE = ("attn.{q,out}", "conv.io", "text/attn.q")


def pipeline() -> Any:
    return tiny_pipeline("sd")


def put(model: Any, method: str, seed: int, where: Any = WHERE, **config: Any) -> Attachment:
    """Attaches an adapter and randomizes all its parameters, at different scales so that singular values differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = attach(model, method, where=where, name=f"{method}_{seed}", **config)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=draws) * 0.2)
    return tuned


def change(tuned: Attachment, name: str) -> Tensor:
    """ΔW as a matrix in double precision: s·B A of a LoRA, weight(W) − W of other methods."""
    site: Any = tuned.parts[name][0]
    adapter: Any = tuned.parts[name][1]
    with torch.no_grad():
        if tuned.method.name == "lora":
            found = torch.einsum("or,ri->oi", adapter.up.double().flatten(1), adapter.down.double().flatten(1))
            return found * adapter.scaling * tuned.scale
        weight = base_tensor(tuned.towers[site.component], site.path, site.param)
        found = adapter.weight(weight) - weight
        return (found * 1.0).double().flatten(1)


def lost(expected: Tensor, got: Tensor) -> float:
    """Relative error ‖expected − got‖ / ‖expected‖."""
    return float((expected - got).pow(2).sum().sqrt() / expected.pow(2).sum().sqrt())
