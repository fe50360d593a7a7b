"""Parts of a vision transformer of transformers: attention with separate projections, tokens, attention pooling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from veneer.injection.sites import BranchSite, Port, Site, StreamSite, TokenSite

from .._describe import TowerPart, own_parameters
from .._open_clip_blocks import attention
from .._records.block_parts import FeedForward, layer_scale, read_port, width_of, write_port

MLP = {"fc1": "in", "gate_proj": "gate", "up_proj": "in", "fc2": "out", "down_proj": "out"}
"""Layers of feed-forwards, plain and gated, with the last component of their roles."""


@dataclass(frozen=True)
class VisionPart(TowerPart):
    """A part of a vision tower, whose branches and streams have class and register tokens, and a grid of patches.

    Args:
        place: `prefix_tokens` and `grid` of branches and streams. `patch`, `can_insert`: as for a `TokenSite`.
    """

    place: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    patch: tuple[int, int, int] = field(default=(16, 16, 3), kw_only=True)
    can_insert: bool = field(default=True, kw_only=True)

    def branch(self, name: str, role: str, read: Port, write: Port, width: int, **fields: Any) -> BranchSite:
        return super().branch(name, role, read, write, width, **{**self.place, **fields})

    def stream(self, path: str, width: int, **fields: Any) -> StreamSite:
        return super().stream(path, width, **{**self.place, **fields})

    def tokens(self, name: str, first: str, last: str, width: int, role: str) -> TokenSite:
        """The token sequence from the input of the block `first` to the output of `last`."""
        return TokenSite(
            name=name, role=role, enter=Port(first, "in"), leave=Port(last, "out"), width=width, patch=self.patch,
            prefix_tokens=self.place["prefix_tokens"], can_insert=self.can_insert, **self.labels,
        )  # fmt: skip


@dataclass(frozen=True)
class SelfAttention:
    """A self-attention with `q_proj`, `k_proj` and `v_proj`, the norm before it, and its branch.

    Args:
        path: of the module. `norm`: norm before it. `out`: output layer.
        scale: layer scale of the block after it: a module, which writes the branch, or a parameter.
        rotary: True if keys are rotated, so that their bias has an effect.
    """

    path: str
    norm: str
    out: str = "o_proj"
    scale: str = ""
    rotary: bool = False

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        path = f"{block}.{self.path}"
        yield from part.norm(f"{block}.{self.norm}")
        # A constant added to all keys shifts all scores of a query alike, which softmax cancels.
        inert = {"k"} if not self.rotary else set()
        projections = (part.layer(f"{path}.{x}_proj", f"attn.{x}", inert_bias=x in inert) for x in "qkv")
        layers = chain(*projections, part.layer(f"{path}.{self.out}", "attn.out"))
        can_extend = isinstance(part, VisionPart) and part.can_insert
        yield from layers if self.rotary else part.self_attention(path, layers, can_extend=can_extend)
        yield from layer_scale(part, block, self.scale)
        read, write = read_port(part, block, self.norm, path), write_port(part, block, self.scale, path)
        width = width_of(part.module(f"{path}.q_proj"))
        yield part.branch(path, "attn", read, write, width, normed=Port(read.path, "out"))


@dataclass(frozen=True)
class Tokens:
    """The residual stream and the token sequence of a block.

    Args:
        norm: a norm of the stream. `rotary`: True if keys are rotated by the positions of all patches.
    """

    norm: str
    rotary: bool = False

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        assert isinstance(part, VisionPart)
        width = width_of(part.module(f"{block}.{self.norm}"))
        yield part.stream(block, width, can_drop=part.can_insert and not self.rotary)
        yield part.tokens(f"{block}.tokens", block, block, width, "tokens.block")


@dataclass(frozen=True)
class Parameters:
    """The parameters of a module of the block, such as a table of relative positions. `role`: of the parameters."""

    path: str
    role: str

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        path = f"{block}.{self.path}"
        for param in own_parameters(part.module(path)) if part.module(path) is not None else ():
            yield part.parameter(path, param, self.role)


@dataclass(frozen=True)
class PooledAttention:
    """SigLIP's pooling: attention of one learned query to all patches, by torch's `MultiheadAttention`, and an MLP."""

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        yield part.parameter(block, "probe", "embed.pool")
        yield from attention(part, f"{block}.attention", "pool")
        yield from FeedForward("mlp", "layernorm", "pool.mlp", MLP, branch=False, plain_norm=True).sites(part, block, order)
