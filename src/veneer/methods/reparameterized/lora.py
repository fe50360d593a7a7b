"""LoRA: a low-rank change beside a frozen weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, WeightSite

N = TypeVar("N", int, float)


class LoRAAdapter(Adapter):
    """y' = y + s·B(A x), W' = W + s·B A. Shapes: `down` (rank, d_in[, k, k]), `up` (d_out, rank[, 1, 1]).

    An embedding keeps `down` as (d_in, rank), rows looked up by id, and `up` as (d_out, rank).
    """

    blends: ClassVar[bool] = True

    def __init__(self, site: WeightSite, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.site, self.scaling, self.dropout = site, scaling, dropout
        if site.kind == "embedding":
            self.down = nn.Parameter(torch.empty(site.d_in, rank))
            self.up = nn.Parameter(torch.zeros(site.d_out, rank))
        else:
            ones = (1,) * len(site.kernel)
            self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
            self.up = nn.Parameter(torch.zeros(site.d_out, rank // site.groups, *ones))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: what the module read; y: what it gave."""
        if self.dropout and self.site.kind != "embedding":
            x = F.dropout(x, self.dropout, self.training)
        return y + self._change(x, self.down, self.up, self.strength * self.scaling)

    def _change(self, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        """B (s·A x): scaled between the two, where there are only `rank` features."""
        site = self.site
        if site.kind == "embedding":
            return F.linear(F.embedding(x, down) * scale, up)
        if site.kind == "linear":
            return F.linear(F.linear(x, down) * scale, up)
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(site.kernel) - 1]
        padding: Any = site.padding
        low = conv(x, down, None, site.stride, padding, site.dilation, site.groups)
        return conv(low * scale, up, groups=site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·B A, in W's shape."""
        return weight + self.delta() * (self.strength * self.scaling)

    def delta(self) -> Tensor:
        """B A in the weight's shape, without any scale."""
        return self._product(self.down, self.up)

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        site = self.site
        if site.kind == "embedding":
            return down @ up.T
        if site.groups == 1:
            return (up.flatten(1) @ down.flatten(1)).reshape(site.weight_shape)
        pairs = [t.flatten(1).unflatten(0, (site.groups, -1)) for t in (up, down)]
        return torch.bmm(*pairs).reshape(site.weight_shape)


@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + s·B A with s = alpha / rank, A random and B zero; only A and B are trained.

    Args:
        rank: columns of B and rows of A, at least 1.
        alpha: numerator of the scale; None means the rank, so that s = 1.
        ranks, alphas: role pattern to another rank or alpha, such as `{"mlp.*": 4}`, or the name of a site, such as
            `{"name:unet.conv_in": 4}`. A site's own name counts before its role, and of role patterns the last that matches.
        rslora: s = alpha / sqrt(rank) instead (rank-stabilised).
        dropout: probability of dropping an input feature of A in training, 0 to 1.
        init: how A is drawn: `kaiming` (uniform, a = sqrt 5) or `gaussian` (standard deviation 1 / rank).
        up_ratio: learning rate of B over that of A (LoRA+ uses 16); 1 for one rate.
    Convolutions: A has the base's kernel, stride and padding, B is 1×1. Grouped ones: a low-rank pair per group, `rank`
    split over the groups, so it must divide by their number.
    Counts: rank·(d_in·k·k / groups) + d_out·rank / groups per site.
    Source: Hu et al., LoRA, ICLR 2022, equation 3; Kalajdzievski 2023 (rsLoRA); Hayou et al., ICML 2024 (LoRA+). `gaussian` with
    1/rank follows peft; the paper says only "random Gaussian".
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 8
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"
    up_ratio: float = 1.0

    def __post_init__(self) -> None:
        if min([self.rank, *self.ranks.values()]) < 1:
            raise ValueError(f"lora: rank must be at least 1, got {self.rank} and {dict(self.ranks)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout must be in [0, 1), got {self.dropout}")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"lora: init must be 'kaiming' or 'gaussian', got {self.init!r}")

    def rank_at(self, role: str, name: str = "") -> int:
        """The rank at a role, or at the site of that role and name."""
        return _meant(self.ranks, role, name, self.rank)

    def alpha_at(self, role: str, name: str = "") -> float:
        """The alpha at a role, or at the site of that role and name."""
        return float(_meant(self.alphas, role, name, self.alpha or self.rank_at(role, name)))

    def scaling_at(self, role: str, name: str = "") -> float:
        """s at a role, or at the site of that role and name."""
        rank = self.rank_at(role, name)
        return self.alpha_at(role, name) / (math.sqrt(rank) if self.rslora else rank)

    def build(self, site: WeightSite) -> LoRAAdapter:
        """A and B for one weight.

        Raises:
            ValueError: a grouped convolution whose groups do not divide the rank.
        """
        rank = self.rank_at(site.role, site.name)
        if rank % site.groups:
            raise ValueError(
                f"rank {rank} must divide by the convolution's {site.groups} groups; give ranks={{'{site.role}': …}}"
            )
        adapter = LoRAAdapter(site, rank, self.scaling_at(site.role, site.name), self.dropout)
        if self.init == "gaussian":
            nn.init.normal_(adapter.down, std=1 / rank)
        elif site.kind == "embedding":
            nn.init.normal_(adapter.down)
        else:
            nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        return adapter

    def count(self, site: WeightSite) -> int:
        """rank·(d_in·k·k + d_out) / groups, with the groups' kernels counted once each."""
        rank, kernel = self.rank_at(site.role, site.name), math.prod(site.kernel)
        return rank * site.d_in * kernel // site.groups + site.d_out * rank // site.groups

    def groups(self, adapters: Iterable[tuple[Site, Adapter]]) -> list[dict[str, Any]]:
        """A at the learning rate, B at `up_ratio` times it."""
        if self.up_ratio == 1:
            return super().groups(adapters)
        named = [(k, p) for _, a in adapters for k, p in a.named_parameters()]
        return [
            {"params": [p for k, p in named if k == "down"], "lr_scale": 1.0},
            {"params": [p for k, p in named if k == "up"], "lr_scale": self.up_ratio},
        ]


def _meant(values: Mapping[str, N], role: str, name: str, default: N) -> N:
    own = values.get(f"name:{name}")
    return own if own is not None else next((v for p, v in reversed(tuple(values.items())) if _means(p, role)), default)


def _means(pattern: str, role: str) -> bool:
    return fnmatchcase(role, pattern) or fnmatchcase(role, pattern + ".*")
