"""Hadamard adapter: the output of every attention, multiplied by one vector and shifted by another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from veneer.functional.channel_scale import scale_features
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import WeightSite


class HadamardAdapter(Adapter):
    """A' = w ∘ A + b, which is W' = diag(w) W and the bias w ∘ bias + b. `gain`: w − 1. `shift`: b. Both (d_out,)."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.site = site
        self.gain = nn.Parameter(zeros(site.d_out))
        self.shift = nn.Parameter(zeros(site.d_out))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: A, the layer's output with its bias."""
        return scale_features(y, self._scale(), self.shift * self.strength, self.site.kind == "conv")

    def weight(self, weight: Tensor) -> Tensor:
        """Rows of W times w."""
        return weight * self._scale().view(-1, *(1,) * (weight.ndim - 1))

    def bias(self, bias: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """w ∘ bias + b."""
        return bias * self._scale() + self.shift * self.strength

    def _scale(self) -> Tensor:
        return 1 + self.gain * self.strength


@dataclass(frozen=True)
class Hadamard(Method):
    """A' = w ∘ A + b for the output A of every attention; w is initialized to ones and b to zeros.

    In a vision transformer A is the output of the attention's last layer, before layer scale and the sum with the stream. In
    convolutional networks without attention, the default are the convolutions that mix positions: depthwise ones and those of
    residual blocks.

    Layers without a bias are adapted at their output, but cannot be merged, because there is no tensor for b.
    Counts: 2·d_out per site; ViT-B/16 18,432, with the norms after the attention 36,864.
    Source: Chen et al., Hadamard Adapter, CIKM 2023, section 3, equation of the adapter and its initialization. The authors have
    published no code; the learning rate is that of `bitfit`, the paper does not state one for vision. The paper trains in two
    stages, the head alone and then the adapters with the norms after them: `linear_probe` or `lp_ft` first, and
    `train="norm"` here. It also drops the adapters of redundant layers, which a selection by depth does (`where="attn.out@4:"`).
    Deviations: w = 1 + `gain`, so that weight decay pulls towards the base; text queries of cross-attention are adapted as well.
    """

    name: ClassVar[str] = "hadamard"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = (
        "Chen et al., Hadamard Adapter: An Extreme Parameter-Efficient Adapter Tuning Method for Pre-trained Language Models, "
        "CIKM 2023"
    )
    needs: ClassVar[tuple[Need, ...]] = (
        Need(WeightSite, where={"kind": ("linear", "conv"), "fused": False, "called": True}),
        Need(WeightSite, roles=("attn.out", "xattn.out"), where={"kind": "linear", "called": False}),
    )
    default: ClassVar[tuple[str, ...]] = ("attn.out", "xattn.out")
    fallback: ClassVar[tuple[str, ...]] = ("conv.dw", "conv.res")
    learning_rate: ClassVar[float] = 1e-3

    def build(self, site: WeightSite) -> HadamardAdapter:
        """w = 1 and b = 0 for one layer."""
        return HadamardAdapter(site)

    def count(self, site: WeightSite) -> int:
        """A scale and a shift for each output."""
        return 2 * site.d_out
