"""Start DoRA on a vision transformer: every linear layer, on a base with real weights.

DoRA's magnitude begins as the norms of the base. `peft` computes them when it attaches; here what is trained is the difference to
them, which begins as nothing, and norms are taken where they are used. `peft`'s `low_cpu_mem_usage` is no contender: its matrices
are on `meta` then, to be filled from a file, so nothing has been started.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

from ..injection import attach
from . import peers
from .contest import Contender, Contest
from .shapes import sharing


def contests(rank: int, architecture: str = "vit_large_patch16_224", **options: Any) -> list[Contest]:
    """One contest; each timing has modules of its own over the same weights, made before the clock starts.

    Args:
        architecture, options: of `timm.create_model`.
    """
    base = vit(architecture, **options)
    fresh = partial(sharing, base)
    names = tuple(f"name:{name}" for name, module in base.named_modules() if isinstance(module, nn.Linear))
    ours = partial(_by_veneer, rank=rank, at=names)
    ways = [Contender("veneer", ours, fresh)]
    pairs: list[tuple[str, str]] = []
    if peers.has_peft():
        theirs = partial(_by_peft, rank=rank, at=peers.linears(base))
        peers.check_equal(ours(fresh()), theirs(fresh()))
        ways.append(Contender("peft", theirs, fresh))
        pairs.append(("veneer", "peft"))
    what = f"DoRA of rank {rank} on {len(names)} linear layers of {architecture}, on the CPU"
    return [Contest("start, dora", what, tuple(ways), tuple(pairs))]


def vit(architecture: str, **options: Any) -> nn.Module:
    """A frozen vision transformer with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = importlib.import_module("timm").create_model(architecture, pretrained=False, **options)
    return model.requires_grad_(False)


def _by_veneer(model: Any, rank: int, at: tuple[str, ...]) -> Any:
    attach(model, "dora", rank=rank, where=at)
    return model


def _by_peft(model: Any, rank: int, at: str) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=at, use_dora=True)
    inject_adapter_in_model(config, model)
    return model
