"""RepAdapter: a linear bottleneck before a layer, which merges into the layer's weight and bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.functional.convolve import convolve
from veneer.functional.low_rank_autograd import add_product
from veneer.functional.low_rank_autograd import project as project_features
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.seams.adapter_calls import cast
from veneer.injection.sites import WeightSite


class RepBottleneck(Adapter):
    """x' = x + s·B (A x), W' = W (I + s·B A). `down`: A (h, d_in). `up`: B (d_in, h / groups), each group of inputs with its
    part of the bottleneck.
    """

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite, bottleneck: int, groups: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.site, self.groups, self.dropout, self.scale = site, groups, dropout, scale
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(bottleneck, site.d_in)))
        self.up = nn.Parameter(torch.zeros(site.d_in, bottleneck // groups))

    def input(self, x: Tensor) -> Tensor:
        """x': a product with h features, dropout on them in training, and a second product added in place."""
        low = self._low(cast(x, self))
        return self._add(x, F.dropout(low, self.dropout, self.training), self._dense() * self._factor)

    def weight(self, weight: Tensor) -> Tensor:
        """W + s·(W B) A."""
        change = (self._wide(weight) @ self._dense()) @ (self.down * self._factor)
        return weight + change.view(weight.shape)

    @property
    def _factor(self) -> Tensor:
        return self.strength * self.scale

    def _low(self, x: Tensor) -> Tensor:
        """A x."""
        if self.site.kind == "linear":
            return project_features(x, self.down)
        return convolve(x, self.down.view(*self.down.shape, *self._ones))

    def _add(self, x: Tensor, low: Tensor, up: Tensor) -> Tensor:
        return add_product(x, low, up if self.site.kind == "linear" else up.view(*up.shape, *self._ones))

    def _dense(self) -> Tensor:
        """B as (d_in, h), zero outside the diagonal blocks."""
        return self.up if self.groups == 1 else torch.block_diag(*self.up.chunk(self.groups))

    def _wide(self, weight: Tensor) -> Tensor:
        """W as (d_out, d_in), in the dtype of A and B."""
        return weight.flatten(1).to(self.down.dtype)

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.site.kernel)


class BiasedRepBottleneck(RepBottleneck):
    """x' = x + s·(B (A x + a) + c), with b' = b + s·W (B a + c). `down_bias`: a (h,). `up_bias`: c (d_in,)."""

    def __init__(self, site: WeightSite, bottleneck: int, groups: int, dropout: float, scale: float) -> None:
        super().__init__(site, bottleneck, groups, dropout, scale)
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(site.d_in))

    def input(self, x: Tensor) -> Tensor:
        """As without biases; c is appended as a column of B, so that it is added in the same pass."""
        along, ones = (-1, ()) if self.site.kind == "linear" else (1, self._ones)
        low = self._low(cast(x, self)) + self.down_bias.view(-1, *ones)
        low = F.dropout(low, self.dropout, self.training)
        low = torch.cat((low, torch.ones_like(low.narrow(along, 0, 1))), along)
        up = torch.cat((self._dense(), self.up_bias.unsqueeze(1)), 1)
        return self._add(x, low, up * self._factor)

    def bias(self, bias: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """b + s·W (B a + c)."""
        shift = self._dense() @ self.down_bias + self.up_bias
        return bias + self._wide(weight()) @ (shift * self._factor)


@dataclass(frozen=True)
class RepAdapter(Method):
    """x' = x + s·(B Drop(A x + a) + c) for the input x of a layer, without activation, so that it merges into W and b.

    A (h, d_in) is initialized Xavier-uniformly, B (d_in, h / up_groups) is block-diagonal and zero, as are both biases. Merged:
    W' = W (I + s·B A) and b' = b + s·W (B a + c).

    Args:
        bottleneck: h, a multiple of `up_groups`.
        up_groups: groups of B, dividing d_in too. `dropout`: dropout of the h features, in training.
        scale: s, 0.1 to 10 by task in the paper.
        bias: use a and c.
    Supports linear layers and 1x1 convolutions without groups and padding. Others are rejected: an input mixing cannot be merged
    into a depthwise weight, and the shift c does not apply to zero padding. So on ConvNeXt `mlp.in` is adapted, not `conv.dw`.
    If a weight is read and not called (open_clip's attention), or is a slice, W is modified in each forward pass; then there
    is no dropout, and no a and c if no bias follows, as in BEiT.
    By default before attention and MLP: one for a fused q, k and v, and one each if they are separate layers.
    Counts: d_in·h + d_in·h / up_groups per site, and h + d_in with biases; ViT-B/16 239,808, without biases the paper's 221,184.
    Source: Luo et al., Towards Efficient Visual Adaption via Structural Re-parameterization, 2023, sections 3.2 and 3.3; sizes,
    initialization and biases as in its code, which also adapts ConvNeXt's depthwise convolutions and does not merge there.
    Deviation: three adapters instead of one if q, k and v are separate layers.
    """

    name: ClassVar[str] = "repadapter"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Luo et al., Towards Efficient Visual Adaption via Structural Re-parameterization, 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.{q,k,v}", "mlp.in_gate", "mlp.{in,gate}")
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv.pw")
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 8
    up_groups: int = 2
    dropout: float = 0.1
    scale: float = 1.0
    bias: bool = True

    def __post_init__(self) -> None:
        if self.up_groups < 1 or self.bottleneck < 1 or self.bottleneck % self.up_groups:
            message = f"repadapter: bottleneck must be a multiple of up_groups, got {self.bottleneck} and {self.up_groups}"
            raise OptionError(message, option="bottleneck", method=self.name, given=(self.bottleneck, self.up_groups))
        if not 0 <= self.dropout < 1:
            raise OptionError.of("repadapter", "dropout", self.dropout, "in [0, 1)")

    def build(self, site: WeightSite) -> RepBottleneck:
        """A and B, and their biases where possible.

        Raises:
            ValueError: `up_groups` does not divide the inputs, or the convolution cannot merge a preceding bottleneck.
        """
        if site.kind == "conv" and (site.groups > 1 or math.prod(site.kernel) > 1 or is_padded(site)):
            raise OptionError(
                f"a convolution of kernel {site.kernel}, {site.groups} groups and padding {site.padding} cannot merge a "
                "preceding bottleneck. Select linear layers and 1x1 convolutions without groups and padding",
                option="where",
                method=self.name,
                given=(site.kernel, site.groups, site.padding),
            )
        if site.d_in % self.up_groups:
            message = f"up_groups = {self.up_groups} does not divide its {site.d_in} inputs; choose another"
            raise OptionError(message, option="up_groups", method=self.name, given=self.up_groups, expected=site.d_in)
        kind = BiasedRepBottleneck if self._biased(site) else RepBottleneck
        return kind(site, self.bottleneck, self.up_groups, self.dropout, self.scale)

    def count(self, site: WeightSite) -> int:
        """A, B and their biases."""
        weights = site.d_in * self.bottleneck + site.d_in * self.bottleneck // self.up_groups
        return weights + (self.bottleneck + site.d_in if self._biased(site) else 0)

    def _biased(self, site: WeightSite) -> bool:
        """True if biases can be applied: to the input of a called layer, or to a bias after a weight."""
        return self.bias and bool(site.bias or (site.called and site.rows is None))


def is_padded(site: WeightSite) -> bool:
    """True for a convolution that may use zero padding."""
    return site.padding not in ("valid", "same") if isinstance(site.padding, str) else any(site.padding)
