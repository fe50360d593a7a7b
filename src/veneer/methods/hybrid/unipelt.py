"""UniPELT: trained keys and values, low-rank updates and bottlenecks, each multiplied by a gate of its input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.channels import Layout, add_channels_product, channels_product
from veneer.functional.low_rank_autograd import add_product, project
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite, ParamSite, WeightSite
from veneer.methods.additive.bottleneck._bottleneck import OutputBottleneck, count_bottleneck
from veneer.methods.prompt.soft_prompts._prefix import PrefixAdapter, PrefixMethod
from veneer.methods.selective.tensors.bitfit import BitFit, BitFitAdapter

from ._prefix_part import PrefixPartMethod

INITIAL_STD = 0.02


class Gate(nn.Module):
    """g(x) = mean_t sigmoid(w·x_t + b) over the tokens or positions t of a sample. `weight` (1, width) is w, `bias` (1,) is b."""

    def __init__(self, width: int, layout: Layout = "NLC") -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(1, width).normal_(std=INITIAL_STD))
        self.bias = nn.Parameter(zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, …), as many dimensions as x. x: (batch, …, width), or (batch, width, …) for `NCHW`."""
        gates = F.linear(x.movedim(1, -1) if self.layout == "NCHW" else x, self.weight, self.bias).sigmoid()
        return gates.mean(tuple(range(1, gates.ndim)), keepdim=True)


class GatedPrefix(PrefixAdapter):
    """Keys g(x) P_k and values g(x) P_v: x the tokens that the attention module reads."""

    def __init__(self, site: WeightSite, tokens: int, hidden: int, dropout: float) -> None:
        super().__init__(site, tokens, hidden, dropout)
        self.gate = Gate(site.d_out)

    def keys_values_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, p, width / heads)."""
        gate = self.gate(x.flatten(1, -2)).unsqueeze(-1)
        keys, values = self.keys_values()
        return gate * keys, gate * values


class GatedPair(Adapter):
    """y' = y + g(x)·B A x: `down` (rank, d_in) is A, `up` (d_out, rank) is B."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, site.d_in))
        self.up = nn.Parameter(zeros(site.d_out, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.gate = Gate(site.d_in)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: input of the layer. y: its output."""
        return add_product(y, project(x, self.down) * (self.gate(x) * self.strength), self.up)


class GatedBottleneck(OutputBottleneck):
    """y' = y + g(y)·Up(ReLU(Down(y)))."""

    def __init__(self, site: BranchSite, bottleneck: int) -> None:
        super().__init__(site, bottleneck, "relu")
        self.gate = Gate(site.width, site.layout)
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=INITIAL_STD)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: the output of the MLP, in the site's layout."""
        layout, gate = self.site.layout, self.gate(x)
        z = self.between(channels_product(x, self.down, self.down_bias, layout))
        return add_channels_product(y, z * gate, *self.last(), layout, gate)


@dataclass(frozen=True)
class UniPELT(PrefixPartMethod):
    """o = softmax(q [g P_k; K]ᵀ / √d) [g P_v; V], q' = q + g·B A x (v' likewise) and y' = y + g·Up(ReLU(Down(y))).
    Each part of each module has its own gate g = mean_t sigmoid(w·x_t + b) of the part's input x.

    A gate is one value for each sample, the mean over its tokens t. x is the input of the part: what the attention module reads
    for P_k and P_v, the input of the projection for B A, and the output y of the MLP for Down. P_k and P_v are those of
    `prefix_tuning`, Down and Up those of `pfeiffer`; g replaces the scale of LoRA. Gates depend on the input, so nothing can be
    merged. The mean includes class tokens and padding; in windows of Swin, each window has its own gates for attention.

    Args:
        tokens: p, prefix length (virtual tokens): trained keys and values of each attention module, at least 1.
        hidden: width of the hidden layer of the MLP that computes P_k and P_v during training; 0 trains them directly, without
            it.
        rank: r, rank of the update B A of queries and values, at least 1.
        reduction: reduction factor of the adapter of the MLP, at least 1: the bottleneck between Down and Up is h = width //
            reduction.
        dropout: dropout probability of P_k and P_v, 0 to 1.
        biases: also train the biases, as `bitfit`, without gates.
    In a training loop of your own: `attachment.finalize()` after the last step replaces the MLP of the keys by its result.
    Counts: after training 2·p·width + width + 1 per attention module, r·(d_in + d_out) + d_in + 1 for each of query and value,
    2·width·h + h + 2·width + 1 per MLP; ViT-B/16 1,410,672, of which 36,912 in gates. During training those of `prefix_tuning`
    instead of 2·p·width. With `biases` also 1 per bias.
    Supports the attention modules that `prefix_tuning` supports, with its strength. A projection that is read instead of called,
    as in open_clip, gets no B A, whose gate needs the input of each call.
    Source: Mao et al., UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, ACL 2022, section 3, and the
    authors' code: w N(0, 0.02²), b = 0, A Kaiming-uniform, B zero, rank 8, p = 10, hidden 512, reduction 16, ReLU. Deviations:
    the adapter reads the output of the MLP, in BERT the norm of its sum with the stream; P_k and P_v have the initialization of
    `prefix_tuning`; cross-attention has parts as well. The shared softmax gate of the code is not here.
    """

    name: ClassVar[str] = "unipelt"
    uses: ClassVar[tuple[str, ...]] = ("classification", "style")
    paper: ClassVar[str] = "Mao et al., UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, ACL 2022"
    needs: ClassVar[tuple[Need, ...]] = (
        *PrefixMethod.needs,
        Need(WeightSite, roles=("attn.[qv]", "xattn.[qv]"), where={"kind": "linear", "called": True}),
        Need(BranchSite, roles=("mlp",)),
    )
    default: ClassVar[tuple[str, ...]] = ("attn.{q,v,out}", "xattn.{q,v,out}", "mlp")
    learning_rate: ClassVar[float] = 1e-3

    tokens: int = 10
    hidden: int = 512
    rank: int = 8
    reduction: int = 16
    dropout: float = 0.0
    biases: bool = False

    def __post_init__(self) -> None:
        self.check_prefix_options()
        for option in ("rank", "reduction"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")
        if self.biases:
            object.__setattr__(self, "needs", (*type(self).needs, *BitFit.needs))
            object.__setattr__(self, "default", (*type(self).default, *BitFit.default))

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """With a small MLP of the keys and values, and without it and with biases."""
        return cls(tokens=3, hidden=8, reduction=2), cls(tokens=2, hidden=0, rank=2, reduction=2, biases=True)

    def changes_at_start(self, site: Any) -> bool:
        """True for attention and MLPs; B and the deltas of biases are zero."""
        return isinstance(site, BranchSite) or self.has_prefix(site)

    def build(self, site: WeightSite | BranchSite | ParamSite) -> Adapter:  # type: ignore[override]
        """The part of one site, with its gate; a delta without a gate for a bias."""
        if isinstance(site, ParamSite):
            return BitFitAdapter(site.shape, site.channel_dim)
        if isinstance(site, BranchSite):
            return GatedBottleneck(site, self.width_at(site))
        return GatedPrefix(site, self.tokens, self.hidden, self.dropout) if self.has_prefix(site) else GatedPair(site, self.rank)

    def width_at(self, site: BranchSite) -> int:
        """h at a site."""
        return max(1, site.width // self.reduction)

    def count(self, site: Any) -> int:
        """The parameters of the part and those of its gate, width + 1."""
        if isinstance(site, ParamSite):
            return math.prod(site.shape)
        if isinstance(site, BranchSite):
            return count_bottleneck(site.width, self.width_at(site)) + site.width + 1
        if self.has_prefix(site):
            return super().count(site) + site.d_out + 1
        return self.rank * (site.d_in + site.d_out) + site.d_in + 1
