"""Tiny-attention adapter: attention with a few features per head beside the attention of every block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite

Position = Literal["parallel", "sequential"]


class TinyAttentionAdapter(Adapter):
    """y' = y + mean_m Softmax(Q_m K_mᵀ / √d) V_m O_mᵀ with Q_m = x W_mᵀ and so on; x the stream.

    Shapes: `query`, `key`, `value` (heads, d, width), `up` (heads, width, d), biases (heads, d) and `up_bias` (width,).
    """

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["read", "normed", "write"]] = "read"

    def __init__(self, site: BranchSite, heads: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, site.tower.startswith("text")
        bound = 1 / math.sqrt(site.width)
        for name in ("query", "key", "value"):
            self.register_parameter(name, nn.Parameter(torch.empty(heads, dim, site.width).uniform_(-bound, bound)))
            self.register_parameter(f"{name}_bias", nn.Parameter(zeros(heads, dim)) if bias else None)
        self.up = nn.Parameter(zeros(heads, site.width, dim))
        self.up_bias = nn.Parameter(zeros(site.width)) if bias else None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, N, width), the adapter's input and the branch's output."""
        q, k, v = (self._project(x, name) for name in ("query", "key", "value"))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        up = self.up.transpose(0, 1).flatten(1) * (self.strength / self.heads)
        bias = None if self.up_bias is None else self.up_bias * self.strength
        return y + F.linear(attended, up, bias)

    def _project(self, x: Tensor, name: str) -> Tensor:
        """(B, N, width) to (B, heads, N, d)."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        low = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return low.unflatten(-1, weight.shape[:2]).transpose(1, 2)


class NormedTinyAttention(TinyAttentionAdapter):
    """The same with x after the branch's norm."""

    input_port: ClassVar[Literal["normed"]] = "normed"


class SequentialTinyAttention(TinyAttentionAdapter):
    """The same with x = y: reads the output of the branch."""

    input_port: ClassVar[Literal["write"]] = "write"


def average_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an attachment with `heads=1` whose head has the mean of the weights of all heads, for deployment.

    Equal to the trained attachment if all heads are equal; otherwise another function of fewer parameters, so evaluate it again.

    Args:
        state: `state_dict()` of an attachment of `tiny_attention`.
    """
    shared = ("up_bias",)
    return {name: t if name.endswith(shared) else t.mean(0, keepdim=True) for name, t in state.items()}


@dataclass(frozen=True)
class TinyAttention(Method):
    """y' = y + mean_m Softmax((x Q_mᵀ)(x K_mᵀ)ᵀ / √d) (x V_mᵀ) O_mᵀ: y the attention of a block, x its input after the norm.

    Every head m has only d features; O is initialized to zero. The heads are a mixture of experts: after training,
    `average_heads(tuned.state_dict())` gives the state of an attachment with `heads=1`, whose head has their mean weights.

    Args:
        heads: number of heads, at least 1.
        dim: d, features of a head, at least 1.
        position: `parallel` reads the norm before the attention, `sequential` the output of the attention.
        bias: all four projections have biases; that of O is one for all heads.
    Attention is over all tokens, and over the earlier ones in text towers, as CLIP's. Each layer computes N² scores for N tokens;
    in UNets select the blocks of low resolution by `where`. Where the norm's output is no site's port (UNets, most diffusion
    transformers, text encoders of pipelines), `parallel` reads the stream before the norm. Features with two spatial dimensions
    (Swin) and cross-attention, whose keys are another sequence, are not supported.
    Counts: 4·heads·dim·width per block, with biases 3·heads·dim + width more; ViT-B/16 147,456, with `heads=1` 36,864, and
    46,116 with biases.
    Source: Zhao, Tan, Mei, Tiny-Attention Adapter, EMNLP 2022, section 2. The authors have published no code. Not stated there
    and chosen here: the mean over heads instead of their sum, so that averaging equal heads is exact; O zero; Q, K and V as
    torch's linear layer; the learning rate is that of `bitfit`.
    """

    name: ClassVar[str] = "tiny_attention"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = (
        "Zhao, Tan, Mei, Tiny-Attention Adapter: Contexts Are More Important Than the Number of Parameters, EMNLP 2022"
    )
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite, roles=("attn",), where={"layout": "NLC"}),)
    default: ClassVar[tuple[str, ...]] = ("attn",)
    fallback: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3

    heads: int = 4
    dim: int = 1
    position: Position = "parallel"
    bias: bool = False

    def __post_init__(self) -> None:
        for option in ("heads", "dim"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")
        if self.position not in get_args(Position):
            raise OptionError.of(self.name, "position", self.position, f"one of {', '.join(get_args(Position))}")

    def build(self, site: BranchSite) -> TinyAttentionAdapter:
        """Q, K, V and O = 0 for one block."""
        adapter: type[TinyAttentionAdapter] = NormedTinyAttention if site.normed else TinyAttentionAdapter
        if self.position == "sequential":
            adapter = SequentialTinyAttention
        return adapter(site, self.heads, self.dim, self.bias)

    def count(self, site: BranchSite) -> int:
        """4·heads·dim·width, and the biases."""
        features = self.heads * self.dim
        return 4 * features * site.width + (3 * features + site.width if self.bias else 0)
