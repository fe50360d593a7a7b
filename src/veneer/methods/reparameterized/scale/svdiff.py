"""SVDiff: trains the singular values of a weight and keeps its singular vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.convolve import convolve
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.quantized_weight import readable_weight
from veneer.injection.sites import WeightSite


class SVDiffAdapter(Adapter):
    """W' = W + U diag(relu(σ + δ) − σ) Vᵀ for W = U diag(σ) Vᵀ. `delta`: δ, (n,) with n = min(d_out, d_in·k·k / groups).

    U (d_out, n), σ and Vᵀ (n, d_in·k·k / groups) are computed from the host's weight on attaching. They are not saved.
    """

    applies_strength: ClassVar[bool] = True
    U: Tensor
    sigma: Tensor
    Vh: Tensor

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.site = site
        width = math.prod(site.weight_shape[1:])
        n = min(site.weight_shape[0], width)
        self.delta = nn.Parameter(torch.zeros(n))
        for name, shape in (("U", (site.weight_shape[0], n)), ("sigma", (n,)), ("Vh", (n, width))):
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Computes the singular value decomposition of the host's weight, in float32 or better; of Ŵ if it is quantized."""
        weight = readable_weight(tower, self.site, "svdiff")
        if weight.is_meta:
            return
        rows = weight if self.site.rows is None else weight[slice(*self.site.rows)]
        for name, found in zip(
            ("U", "sigma", "Vh"), torch.linalg.svd(rows.to(self.U.dtype).flatten(1), full_matrices=False), strict=True
        ):
            getattr(self, name).copy_(found)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the module's input; y: its output. One product with W' − W: half the work of applying U and Vᵀ separately."""
        site = self.site
        return y + convolve(x, self.change(), site.stride, site.padding, site.dilation, site.groups)

    def weight(self, weight: Tensor) -> Tensor:
        """W + U diag(relu(σ + δ) − σ) Vᵀ."""
        return weight + self.change()

    def change(self) -> Tensor:
        """W' − W at the current strength, in the weight's shape."""
        shift = (self.sigma + self.delta).relu() - self.sigma
        return ((self.U * (shift * self.strength)) @ self.Vh).reshape(self.site.weight_shape)


@dataclass(frozen=True)
class SVDiff(Method):
    """W' = U diag(relu(σ + δ)) Vᵀ for W = U diag(σ) Vᵀ: only δ, one value per singular value, is trained; initialized to zero.

    Convolutions: the kernel is flattened, (d_out, d_in·k·k / groups), which includes grouped and depthwise ones.
    Memory: U and Vᵀ of every weight are kept while attached, as large as the weights or larger, and recomputed on loading.
    Singular vectors of equal singular values, including zeros, are not unique and may differ between machines.
    Counts: min(d_out, d_in·k·k / groups) per site; SD 1.5's UNet 222,696.
    Source: Han et al., SVDiff, ICCV 2023, section 3.2. Deviation: the paper tunes the one-dimensional weights,
    norms and biases, as well; attach `bitfit` or `norm_tuning` in addition for those.
    """

    name: ClassVar[str] = "svdiff"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "smallest_file")
    paper: ClassVar[str] = "Han et al., SVDiff: Compact Parameter Space for Diffusion Fine-Tuning, ICCV 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp", "single", "proj", "conv", "time", "adaln")
    learning_rate: ClassVar[float] = 1e-3

    def build(self, site: WeightSite) -> SVDiffAdapter:
        """δ = 0 for one weight."""
        return SVDiffAdapter(site)

    def count(self, site: WeightSite) -> int:
        """Singular values of the flattened weight."""
        return min(site.weight_shape[0], math.prod(site.weight_shape[1:]))
