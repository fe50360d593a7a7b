"""Time to attach DoRA to every linear layer of a vision transformer on the CPU.

DoRA's magnitude is initialized with the weight norms of the base. `peft` computes them when it attaches; veneer trains the
difference to them, initialized to zero, and computes the norms in the forward pass. `peft`'s `low_cpu_mem_usage` is not compared,
because it leaves the matrices on `meta`, uninitialized.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from veneer.injection import attach

from . import peers
from .interleaved_timing import Contender, Contest
from .shapes import Shape, sharing, vit


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """One contest; each timing uses new modules that share the weights, built before the clock starts."""
    base = vit(shape.large_vit, dtype, seed)
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
    what = f"DoRA of rank {rank} on {len(names)} linear layers of {shape.large_vit}"
    return [Contest("start, dora", what, tuple(ways), tuple(pairs))]


def _by_veneer(model: Any, rank: int, at: tuple[str, ...]) -> Any:
    attach(model, "dora", rank=rank, where=at)
    return model


def _by_peft(model: Any, rank: int, at: str) -> Any:
    return peers.injected(model, "LoraConfig", at, r=rank, lora_alpha=rank, lora_dropout=0.0, use_dora=True)
