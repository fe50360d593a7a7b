"""(IA)³: keys, values and the inner activations of the MLPs, each rescaled by a learned vector."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.channel_scale import scale_features
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.seams.effective_weight import effective_tensor
from veneer.injection.sites import WeightSite


class ScaledOutput(Adapter):
    """W' = diag(l) W, y' = l ∘ (W x) + b with l = 1 + `delta` (d_out,)."""

    applies_strength: ClassVar[bool] = True
    host: nn.Module

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.site = site
        self.delta = nn.Parameter(torch.zeros(site.d_out))

    def enter(self, tower: nn.Module) -> None:
        """Keeps a reference to the module, whose bias `output` reads."""
        self.__dict__["host"] = tower.get_submodule(self.site.path)  # not a submodule: the host contains the adapter

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y: W x + b. Returns l ∘ (y − b) + b."""
        bias, more = effective_tensor(self, self.host, "bias", self.site.rows), self.delta * self.strength
        return scale_features(y, 1 + more, None if bias is None else -more * bias, self.site.kind == "conv")

    def weight(self, weight: Tensor) -> Tensor:
        """Rows of W times l."""
        return weight * (1 + self.delta * self.strength).view(-1, *(1,) * (weight.ndim - 1))


class ScaledInput(Adapter):
    """W' = W diag(l), x' = l ∘ x with l = 1 + `delta` (d_in,)."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.site = site
        self.delta = nn.Parameter(torch.zeros(site.d_in))

    def input(self, x: Tensor) -> Tensor:
        """l ∘ x."""
        return scale_features(x, 1 + self.delta * self.strength, channels=self.site.kind == "conv")

    def weight(self, weight: Tensor) -> Tensor:
        """Columns of W times l; for grouped convolutions, each group with its part of l."""
        scale = (1 + self.delta * self.strength).view(self.site.groups, 1, -1, *(1,) * len(self.site.kernel))
        return (weight.unflatten(0, (self.site.groups, -1)) * scale).flatten(0, 1)


@dataclass(frozen=True)
class IA3(Method):
    """k' = l_k ∘ k, v' = l_v ∘ v and h' = l_ff ∘ h of the MLP's inner activations h; every l is initialized to ones.

    Args:
        inputs: role patterns of layers whose inputs are rescaled, as h is the input of `mlp.out`; for other layers the
            outputs are rescaled.
    Counts: d_out per site, d_in at those of `inputs`; ViT-B/16 55,296, UNets of SD 1.5 99,840 and SDXL 665,600.
    Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, NeurIPS 2022,
    section 3.3; learning rate from its section 3.5. Deviations: l = 1 + delta, so that weight decay pulls towards the base; a
    bias of k or v is unchanged, so that (IA)³ is an update of one weight and supports weights that are read, not called. The
    paper's T5 has no biases; peft also scales them, which for keys is equivalent under a softmax and for values adds the constant
    (l − 1) ∘ b.
    """

    name: ClassVar[str] = "ia3"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "classification", "smallest_file")
    paper: ClassVar[str] = "Liu et al., Few-Shot PEFT is Better and Cheaper than In-Context Learning, NeurIPS 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn.{k,v}", "xattn.{k,v}", "mlp.out")
    learning_rate: ClassVar[float] = 3e-3

    inputs: str | tuple[str, ...] = ("mlp.out", "mlp.context.out")

    def scales_input(self, site: WeightSite) -> bool:
        """True if the input is rescaled."""
        patterns = (self.inputs,) if isinstance(self.inputs, str) else self.inputs
        return any(fnmatchcase(site.role, pattern) for pattern in patterns)

    def build(self, site: WeightSite) -> Adapter:
        """l = 1 for one weight."""
        return ScaledInput(site) if self.scales_input(site) else ScaledOutput(site)

    def count(self, site: WeightSite) -> int:
        """d_in if the input is rescaled, else d_out."""
        return site.d_in if self.scales_input(site) else site.d_out
