"""Start DoRA on a vision transformer: every linear layer, on a base with real weights.

DoRA's magnitude begins as the norms of the base. `peft` computes them when it attaches; here what is trained is the difference to
them, which begins as nothing, and norms are taken where they are used. `peft`'s `low_cpu_mem_usage` is no contender: its matrices
are on `meta` then, to be filled from a file, so nothing has been started.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from veneer.injection import attach

from . import peers
from .contest import Contender, Contest
from .shapes import Shape, sharing, vit


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """One contest; each timing has modules of its own over the same weights, made before the clock starts."""
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
