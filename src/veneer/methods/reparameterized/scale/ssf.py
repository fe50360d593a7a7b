"""SSF: scales and shifts the output of every layer, per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.channel_scale import scale_features
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import NormSite, WeightSite

STD = 0.02


class ScaleAdapter(Adapter):
    """W' = diag(γ) W with γ = 1 + `gain` (d_out,): for weights that are read and have no bias."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite | NormSite) -> None:
        super().__init__()
        self.site = site
        self.gain = nn.Parameter(nn.init.normal_(torch.empty(width_of(site)), std=STD))

    def weight(self, weight: Tensor) -> Tensor:
        """Rows of W times γ; for a norm, its scale."""
        return weight * (1 + self.gain * self.strength).view(-1, *(1,) * (weight.ndim - 1))


class ScaleShiftAdapter(ScaleAdapter):
    """y' = γ ∘ y + β, which is W' = diag(γ) W and b' = γ ∘ b + β. `shift`: β (d_out,)."""

    def __init__(self, site: WeightSite | NormSite) -> None:
        super().__init__(site)
        self.shift = nn.Parameter(nn.init.normal_(torch.empty(width_of(site)), std=STD))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: the layer's output, including its bias."""
        second = self.site.kind == "conv" if isinstance(self.site, WeightSite) else self.site.channel_dim == 1 and y.ndim > 2
        return scale_features(y, 1 + self.gain * self.strength, self.shift * self.strength, second)

    def bias(self, bias: Tensor, weight: object) -> Tensor:
        """γ ∘ b + β."""
        return bias * (1 + self.gain * self.strength) + self.shift * self.strength


@dataclass(frozen=True)
class SSF(Method):
    """y' = γ ∘ y + β after linear layers, convolutions and norms; initially γ ~ N(1, 0.02²) and β ~ N(0, 0.02²), so y' ≈ y.

    A fused q, k and v that is called is one site of the default, which avoids splitting its output; slices have the same
    parameters and may also be selected. Layers without a bias can be scaled and shifted at the output, but cannot be merged.
    If such a weight is read and not called, as BEiT's key, it is scaled only, because there is no tensor for the shift.
    Counts: 2·d_out per site, d_out if scaled only; ViT-B/16 205,824, 16,896 a block, 1,536 for patches and for the last norm.
    Source: Lian, Zhou, Feng, Wang, Scaling & Shifting Your Features, NeurIPS 2022, sections 3.2 and 3.3; initialization, the
    sites in a ViT and the learning rate (2e-3 or 5e-3 by task) as in its code. Deviations: γ = 1 + `gain`, so that weight
    decay pulls towards the base, where the code does not decay γ and β; q/k norms, which its models do not have, are left out of
    the default; so are squeeze-and-excitation layers. On Swin and ConvNeXt the code scales nothing in patch merging and
    downsampling, which the default does (Swin-T 107,136 against 99,072 parameters, ConvNeXt-T 98,688 against 94,656); its
    sites are `where="conv norm attn.qkv attn.out mlp not:name:*downsample*"` on Swin, `where="conv norm mlp
    not:name:*downsample*"` on ConvNeXt. Its last pair of ConvNeXt is before the pooling, here it is after the norm that follows
    the pooling.
    """

    name: ClassVar[str] = "ssf"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = (
        "Lian et al., Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, NeurIPS 2022"
    )
    needs: ClassVar[tuple[Need, ...]] = (
        Need(WeightSite, where={"kind": ("linear", "conv"), "fused": False}),
        Need(WeightSite, where={"kind": "linear", "fused": True, "called": True}),
        Need(NormSite),
    )
    default: ClassVar[tuple[str, ...]] = (
        "conv", "embed.{patch,merge}", "norm", "attn.qkv", "attn", "xattn", "mlp.in_gate", "mlp", "single.in", "single",
        "not:norm.qk",
    )  # fmt: skip
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-3

    def build(self, site: WeightSite | NormSite) -> ScaleAdapter:
        """γ and β, or γ only."""
        return ScaleShiftAdapter(site) if site.called or site.bias else ScaleAdapter(site)

    def count(self, site: WeightSite | NormSite) -> int:
        """A scale and, if possible, a shift for each output."""
        return width_of(site) * (2 if site.called or site.bias else 1)


def width_of(site: WeightSite | NormSite) -> int:
    """Number of outputs."""
    return site.d_out if isinstance(site, WeightSite) else site.width
