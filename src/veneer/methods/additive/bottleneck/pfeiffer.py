"""Pfeiffer's adapter: one bottleneck per block, after the MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.sites import BranchSite

from ._bottleneck import Bottleneck, OutputBottleneck, count_bottleneck

AdapterInput = Literal["branch", "sum"]


class SumBottleneck(Bottleneck):
    """y' = y + A(x + y): reads the stream after the branch, and is added to the branch."""

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the stream before the branch; y: the branch."""
        return super().output(x + y, y)


@dataclass(frozen=True)
class Pfeiffer(Method):
    """y' = y + Up(ReLU(Down(y))): y the output of the MLP, before it is added to the stream x.

    Args:
        reduction: h = width // reduction, at least 1.
        input: the input of Down: the `branch` y, or the `sum` x + y.
    Counts: 2·width·h + h + width per block, h = width // reduction; ViT-B/16 894,528 with h = 48.
    Source: Pfeiffer et al., AdapterFusion, EACL 2021, and MAD-X, EMNLP 2020, equation of the language adapter; ReLU,
    reduction 16 and the initialization (normal with 0.02, biases zero) as in AdapterHub. In their BERT the adapter reads the norm
    of x + y and is added to y, before another norm. A vision transformer has no norm there: `branch` is the form of Jia et al.
    (VPT), ECCV 2022; `sum` that of AdapterHub and of Steitz, Roth, CVPR 2024. Deviations: Steitz and Roth add a norm inside the
    adapter; the VPT code uses GELU and initializes all matrices to zero, of which only the last bias receives a gradient; it
    applies the adapter before stochastic depth, here after layer scale and stochastic depth, as in Adapter+: in training with a
    drop rate above 0 a dropped branch still gets A(0).
    If a host has a gate after the branch, `sum` is taken before the gate.
    """

    name: ClassVar[str] = "pfeiffer"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Pfeiffer et al., AdapterFusion, EACL 2021; MAD-X, EMNLP 2020"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("mlp",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    reduction: int = 16
    input: AdapterInput = "branch"

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise OptionError.of("pfeiffer", "reduction", self.reduction, "at least 1")
        if self.input not in get_args(AdapterInput):
            raise OptionError.of("pfeiffer", "input", self.input, f"one of {', '.join(get_args(AdapterInput))}")

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Both inputs, with enough features for small models: a single one may be negative, thus dead, for all inputs."""
        return cls(reduction=2), cls(reduction=2, input="sum")

    def width_at(self, site: BranchSite) -> int:
        """h at a site."""
        return max(1, site.width // self.reduction)

    def build(self, site: BranchSite) -> Bottleneck:
        """Down and Up for one branch."""
        adapter = (OutputBottleneck if self.input == "branch" else SumBottleneck)(site, self.width_at(site), "relu")
        for weight in (adapter.down, adapter.up):
            nn.init.normal_(weight, std=0.02)
        return adapter

    def count(self, site: BranchSite) -> int:
        """2·width·h + h + width."""
        return count_bottleneck(site.width, self.width_at(site))
