"""Consolidator: a grouped linear layer beside every layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.channels import drop_path_mask
from veneer.functional.convolve import convolve
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite


def groups_of(site: WeightSite, groups: int) -> int:
    """Number of groups at a site: the greatest common divisor of `groups` and both widths."""
    return math.gcd(groups, site.d_in, site.d_out)


class ConsolidatorAdapter(Adapter):
    """W' = W + G, G block-diagonal. `blocks` (d_out, d_in / groups, *kernel): row o is of group o // (d_out / groups)."""

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    shift: nn.Parameter | None

    def __init__(self, site: WeightSite, groups: int, shuffle: bool, drop_path: float) -> None:
        super().__init__()
        self.site, self.groups, self.shuffle, self.drop_path = site, groups_of(site, groups), shuffle, drop_path
        self.blocks = nn.Parameter(torch.empty(site.d_out, site.d_in // self.groups, *site.kernel))
        self.register_parameter("shift", None)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the layer's input; y: its output. In training, a sample's change may be dropped as a whole."""
        change = self._grouped(x) * self.strength
        if self.shift is not None:
            shift = self.shift * self.strength
            change = change + (shift if self.site.kind == "linear" else shift.view(-1, *(1,) * len(self.site.kernel)))
        kept = drop_path_mask(change, self.drop_path, self.training)
        return y + (change if kept is None else change * kept)

    def weight(self, weight: Tensor) -> Tensor:
        """W + G."""
        blocks = self.blocks.unflatten(0, (self.groups, -1))
        dense = torch.diag_embed(blocks.movedim(0, -1)).movedim((-2, -1), (0, 2))  # (groups, out, groups, in[, kernel])
        dense = dense.reshape(self.site.d_out, -1, *self.site.kernel)
        if self.shuffle:
            dense = dense.unflatten(1, (-1, self.groups)).transpose(1, 2).flatten(1, 2)
        return weight + dense * self.strength

    def _grouped(self, x: Tensor) -> Tensor:
        """G x: each group of inputs by its rows of `blocks`."""
        site, groups = self.site, self.groups
        if site.kind == "conv":
            x = x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2) if self.shuffle else x
            return convolve(x, self.blocks, site.stride, site.padding, site.dilation, groups)
        parts = x.unflatten(-1, (groups, -1))
        if self.shuffle:
            parts = parts.transpose(-1, -2).reshape(parts.shape)
        return torch.einsum("...gi,goi->...go", parts, self.blocks.unflatten(0, (groups, -1))).flatten(-2)


class ShiftedConsolidatorAdapter(ConsolidatorAdapter):
    """b' = b + t besides. `shift`: t (d_out,)."""

    def __init__(self, site: WeightSite, groups: int, shuffle: bool, drop_path: float) -> None:
        super().__init__(site, groups, shuffle, drop_path)
        self.shift = nn.Parameter(torch.empty(site.d_out))

    def bias(self, bias: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """b + t."""
        assert self.shift is not None
        return bias + self.shift * self.strength


@dataclass(frozen=True)
class Consolidator(Method):
    """y' = y + DropPath(G x + t): G a linear layer in groups, in which group g of the outputs reads group g of the inputs.

    Without dropping it is linear and merges: W' = W + G as a block-diagonal matrix, b' = b + t.

    Args:
        channel_groups: number of groups, at least 1; at each layer the greatest common divisor of this and of both widths.
        shuffle: interleave the inputs, one of each group after the other, before they are grouped.
        drop_path: probability of dropping the change of a layer for a sample in training, 0 to 1.
        bound: G and t are initialized uniformly within ± bound.
    Supports linear layers and convolutions without groups, in which G has the kernel and the stride of the layer. If a weight is
    read and not called (open_clip's attention), G and t are added to the tensors in each forward pass, without dropping; there
    is no t if no bias follows.
    Counts: d_out·d_in·kernel / channel_groups + d_out per layer; ViT-B/16 304,128.
    Source: Hao et al., Consolidator: Mergeable Adapter with Grouped Connections for Visual Adaptation, ICLR 2023, and the
    authors' code, with one branch, as in its settings; they choose `drop_path` by task, up to 0.8. Deviations: layers with widths
    that `channel_groups` does not divide have fewer groups; convolutions may be selected.
    """

    name: ClassVar[str] = "consolidator"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Hao et al., Consolidator: Mergeable Adapter with Grouped Connections, ICLR 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv"), "groups": 1}),)
    default: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn", "xattn", "mlp.in_gate", "mlp")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    channel_groups: int = 384
    shuffle: bool = False
    drop_path: float = 0.0
    bound: float = 1e-3

    def __post_init__(self) -> None:
        if self.channel_groups < 1:
            raise OptionError.of(self.name, "channel_groups", self.channel_groups, "at least 1")
        if not 0 <= self.drop_path < 1:
            raise OptionError.of(self.name, "drop_path", self.drop_path, "in [0, 1)")
        if self.bound <= 0:
            raise OptionError.of(self.name, "bound", self.bound, "above 0")

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Groups of several channels in small models, in order and interleaved."""
        return cls(channel_groups=4), cls(channel_groups=4, shuffle=True)

    def build(self, site: WeightSite) -> ConsolidatorAdapter:
        """G, and t where possible."""
        kind = ShiftedConsolidatorAdapter if _is_shifted(site) else ConsolidatorAdapter
        adapter = kind(site, self.channel_groups, self.shuffle, self.drop_path)
        for p in adapter.parameters():
            nn.init.uniform_(p, -self.bound, self.bound)
        return adapter

    def count(self, site: WeightSite) -> int:
        """d_out·d_in·kernel / groups, and d_out for t."""
        weights = site.d_out * site.d_in * math.prod(site.kernel) // groups_of(site, self.channel_groups)
        return weights + (site.d_out if _is_shifted(site) else 0)


def _is_shifted(site: WeightSite) -> bool:
    """True if t can be added: to the output of a called layer, or to a bias after a weight."""
    return bool(site.called or site.bias)
