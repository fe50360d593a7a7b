"""A small model with adapters on it, and their changes written out."""

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
    """An adapter with every tensor away from its start, all of another size, so that singular values differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = attach(model, method, where=where, name=f"{method}_{seed}", **config)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=draws) * 0.2)
    return tuned


def change(tuned: Attachment, name: str) -> Tensor:
    """ΔW as a matrix in double precision: s·B A of LoRA from its definition, weight(W) − W of others."""
    site: Any = tuned.parts[name][0]
    adapter: Any = tuned.parts[name][1]
    with torch.no_grad():
        if tuned.method.name == "lora":
            found = torch.einsum("or,ri->oi", adapter.up.double().flatten(1), adapter.down.double().flatten(1))
            return found * adapter.scaling * tuned.scale
        weight = base_tensor(tuned.towers[site.component], site.path, site.param)
        found = adapter.weight(weight) - weight
        return (found * 1.0).double().flatten(1)


def lost(wanted: Tensor, got: Tensor) -> float:
    """‖wanted − got‖ / ‖wanted‖."""
    return float((wanted - got).pow(2).sum().sqrt() / wanted.pow(2).sum().sqrt())
