"""Merging and unmerging: veneer's LoRA on every attention projection compared with diffusers' `fuse_lora` and `unfuse_lora`.

`copy` only clones the same weights, a lower bound for writing W' beside W. Each contender has its own copy of the attention
weights, because merging changes them; the rest of the model is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.injection import attachments

from . import peers
from .interleaved_timing import Contender, Contest
from .shapes import Shape, unet


class MergeFunctions(NamedTuple):
    """Functions to merge and to unmerge; both do nothing if the model is already in that state."""

    merge: Callable[[Any], object]
    unmerge: Callable[[Any], object]


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Contests of `merge` and `unmerge` on the UNet.

    Args:
        rank: of the LoRA on every attention projection, with random matrices.
        dtype: of the base. veneer's adapters are float32, peft's are of the base's dtype.
    Raises:
        BenchError: veneer and peft have different numbers of parameters to merge.
    """
    return of(unet(shape.unet, shape.latent, dtype, seed), rank, seed)


def of(base: nn.Module, rank: int, seed: int) -> list[Contest]:
    """The same contests on an existing model, such as a FLUX transformer, which is not changed."""
    ours = peers.with_veneer(_own_attention(base), rank)
    weights = _weights(ours)
    ways = {"veneer": _veneer(ours, seed), "copy": MergeFunctions(lambda _: [w.clone() for w in weights], lambda _: None)}
    pairs = [("veneer", "copy")]
    if peers.has_peft():
        theirs = _own_attention(base)
        ways["diffusers"] = _diffusers(theirs, rank, seed)
        peers.check_equal(ours, theirs)
        pairs.append(("veneer", "diffusers"))
    numbers, kind = sum(w.numel() for w in weights), str(weights[0].dtype).removeprefix("torch.")
    what = f"LoRA of rank {rank} on {len(weights)} attention projections, {numbers / 1e6:.1f} million weights, {kind}"
    merges = tuple(Contender(name, way.merge, _ready(way.unmerge)) for name, way in ways.items())
    unmerges = tuple(Contender(name, way.unmerge, _ready(way.merge)) for name, way in ways.items() if name != "copy")
    return [
        Contest("merge", f"{what}; copy: the same weights cloned", merges, tuple(pairs)),
        Contest("unmerge", f"{what}; veneer's is bitwise, diffusers' is not", unmerges, tuple(pairs[1:])),
    ]


def _ready(way: Callable[[Any], object]) -> Callable[[], None]:
    def prepare() -> None:
        way(None)

    return prepare


def _veneer(model: nn.Module, seed: int) -> MergeFunctions:
    (tuned,) = attachments(model)
    _fill(tuned.parameters(), seed)
    return MergeFunctions(lambda _: tuned.merged or tuned.merge(), lambda _: tuned.unmerge() if tuned.merged else None)


def _diffusers(model: Any, rank: int, seed: int) -> MergeFunctions:
    """Merging by the model's own `add_adapter`, `fuse_lora` and `unfuse_lora`."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=peers.targets(model)))
    _fill([p for p in model.parameters() if p.requires_grad], seed)
    fused = [False]

    def fuse(_: Any) -> None:
        if not fused[0]:
            model.fuse_lora()
        fused[0] = True

    def unfuse(_: Any) -> None:
        if fused[0]:
            model.unfuse_lora()
        fused[0] = False

    return MergeFunctions(fuse, unfuse)


def _fill(parameters: Any, seed: int) -> None:
    """Fills parameters with random values, so that no product is with zeros."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=draws) * 0.02)


def _weights(model: nn.Module) -> list[Tensor]:
    """The weights to merge into."""
    (tuned,) = attachments(model)
    sites: list[Any] = [site for site, _ in tuned.parts.values()]
    return [model.get_parameter(f"{site.path}.{site.param}") for site in sites]


def _own_attention(base: nn.Module) -> nn.Module:
    """A copy of a model that shares all tensors except those of attention."""
    own = {id(p) for m in base.modules() if hasattr(m, "to_q") for p in m.parameters()}
    shared = {id(t): t for t in (*base.parameters(), *base.buffers()) if id(t) not in own}
    return copy.deepcopy(base, shared)
