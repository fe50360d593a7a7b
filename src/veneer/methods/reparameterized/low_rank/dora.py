"""DoRA: trains a weight's direction as in LoRA, and its magnitude separately."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.functional.channel_scale import scale_features
from veneer.functional.convolve import convolve
from veneer.functional.low_rank_autograd import add_product, project
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.quantized_weight import readable_weight
from veneer.injection.seams.adapter_calls import module_at
from veneer.injection.seams.effective_weight import effective_tensor
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized._state_transfer import lora_state
from veneer.methods.reparameterized._weight_decomposition import AXES, DecomposedAdapter, NormAxis, magnitude_count

from ._low_rank import factor_pairs


class DoRAAdapter(Adapter):
    """W' = g·(W + s·B A), g = m / ‖W + s·B A‖ per output. Shapes: `down` (rank, d_in / groups[, k, k]), `up`
    (d_out, rank / pairs[, 1, 1]), `magnitude_delta` (d_out,), which is m − ‖W‖. `pairs`: as LoRA's.

    Only the norm, d_out values, is computed from W + s·B A; with `output` the sum itself is never materialized.
    """

    applies_strength: ClassVar[bool] = True
    norm_axis: ClassVar[NormAxis] = "output"
    host: nn.Module

    def __init__(self, site: WeightSite, rank: int, scaling: float) -> None:
        super().__init__()
        self.site, self.scaling, self.pairs = site, scaling, factor_pairs(site, rank)
        ones = (1,) * len(site.kernel)
        self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
        self.up = nn.Parameter(zeros(site.d_out, rank // self.pairs, *ones))
        self.magnitude_delta = nn.Parameter(torch.zeros(site.d_out))

    def enter(self, tower: nn.Module) -> None:
        """Keeps a reference to the module, whose weight and bias `output` reads."""
        readable_weight(tower, self.site, "dora")
        self.__dict__["host"] = module_at(tower, self.site.path)  # not a submodule: the host contains the adapter

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the module's input; y: its output, W x + b. Returns g·(y − b + s·B A x) + b, at strength t blended with y."""
        weight, bias = (effective_tensor(self, self.host, p, self.site.rows) for p in (self.site.param, "bias"))
        assert weight is not None
        gain = self.gain(weight)
        more = self.strength * (gain - 1)
        up = self.up * self._by_output(self.strength * self.scaling * gain, self.up)
        site, conv = self.site, self.site.kind == "conv"
        turned = scale_features(y, 1 + more, None if bias is None else -more * bias, conv)
        if self.pairs != site.groups:  # all groups share A, so A x would have many features
            change = (up.flatten(1) @ self.down.flatten(1)).reshape(site.weight_shape)
            return turned + convolve(x, change, site.stride, site.padding, site.dilation, site.groups)
        low = convolve(x, self.down, site.stride, site.padding, site.dilation, site.groups) if conv else project(x, self.down)
        # `turned` was just computed, so it may be modified in place
        return add_product(turned, low, up, over=True) if site.groups == 1 else turned + convolve(low, up, groups=site.groups)

    def state_from(self, other: DoRAAdapter | None) -> dict[str, Tensor]:
        """State with which this makes the update of `other`, or none. `ValueError` if its factors exceed this rank."""
        return lora_state(self, other)

    def weight(self, weight: Tensor) -> Tensor:
        """g·(W + s·B A), at strength t blended with W."""
        gain = self.gain(weight)
        up, down = (t.flatten(1).unflatten(0, (self.pairs, -1)) for t in (self.up, self.down))
        change = (up @ down).reshape(weight.shape)
        scale = self._by_output(self.strength * self.scaling * gain, weight)
        return weight * self._by_output(1 + self.strength * (gain - 1), weight) + change * scale

    def gain(self, weight: Tensor) -> Tensor:
        """m / ‖W + s·B A‖, (d_out,). An output whose row of W is zero has no direction and keeps 1 + m: trained as in LoRA."""
        before, after = self._norms(weight)
        some = before > 0
        return (torch.where(some, before, 1.0) + self.magnitude_delta) / torch.where(some, after, 1.0)

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """‖W‖ and ‖W + s·B A‖ = √(‖W‖² + 2s·Σ (W Aᵀ)∘B + s²·Σ (B A Aᵀ)∘B) per output; constant in the backward pass."""
        s = self.scaling
        with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
            base = weight.to(self.up.dtype).flatten(1).unflatten(0, (self.pairs, -1))
            up, down = (t.flatten(1).unflatten(0, (self.pairs, -1)) for t in (self.up, self.down))
            square = torch.linalg.vector_norm(base, dim=-1).square()
            cross = ((base @ down.mT) * up).sum(-1)
            low = ((up @ (down @ down.mT)) * up).sum(-1)
            after = (square + s * (2 * cross + s * low)).clamp_min(0).sqrt()
            return square.sqrt().flatten(), after.flatten()

    @staticmethod
    def _by_output(vector: Tensor, like: Tensor) -> Tensor:
        return vector.view(-1, *(1,) * (like.ndim - 1))


class InputDoRAAdapter(DecomposedAdapter):
    """W' = (W + s·B A)·diag(g), g = m / ‖W + s·B A‖ per input channel; weight form only. `down` and `up` as in DoRA."""

    def __init__(self, site: WeightSite, rank: int, scaling: float) -> None:
        super().__init__()
        self.site, self.scaling, self.pairs = site, scaling, factor_pairs(site, rank)
        self.down = nn.Parameter(torch.empty(rank, site.d_in // site.groups, *site.kernel))
        self.up = nn.Parameter(zeros(site.d_out, rank // self.pairs, *(1,) * len(site.kernel)))
        self.decompose("input")

    def delta(self) -> Tensor:
        """B A in the weight's shape."""
        up, down = (t.flatten(1).unflatten(0, (self.pairs, -1)) for t in (self.up, self.down))
        return (up @ down).reshape(self.site.weight_shape)

    def state_from(self, other: DoRAAdapter | InputDoRAAdapter | None) -> dict[str, Tensor]:
        """State with which this makes the update of `other`, or none. `ValueError` if its rank or norm axis differs."""
        return lora_state(self, other)


@dataclass(frozen=True)
class DoRA(Method):
    """W' = m·(W + s·B A) / ‖W + s·B A‖ per output, s = alpha / rank; trains m, A and B, m initialized to ‖W‖ and B to 0.

    Args:
        rank: columns of B and rows of A, at least 1.
        alpha: numerator of the scale (default: the rank, so that s = 1).
        norm_axis: `output` takes the norm of each output's row, the default of the authors, peft and LyCORIS. `input` takes it
            of each input channel's column, over all outputs and the kernel, the default of OneTrainer and LyCORIS with
            `wd_on_output=False`; W' is then computed in each forward pass, so a quantized base is rejected.
    Convolutions: one norm per output channel, over its inputs and kernel; grouped ones have A and B as in `lora`.
    Counts: d_out (`input`: d_in / groups) per site more than `lora`; ViT-B/16's q, k and v as one weight, rank 8: 26,880.
    Source: Liu et al., DoRA, ICML 2024, equation 5; the norm is constant in the backward pass, section 4.3. The paper writes W as
    (inputs, outputs), so that its norm of a column is that of an output here, as in its code and in peft. Deviations: the
    trained tensor is m − ‖W‖, with the same function and gradient, zero-initialized on any base; a bias is added
    after, as in peft. A zero row of W has no direction: it is scaled by 1 + m instead of m / ‖·‖. No dropout.
    """

    name: ClassVar[str] = "dora"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "style", "classification")
    paper: ClassVar[str] = "Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 8
    alpha: float | None = None
    norm_axis: NormAxis = "output"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of("dora", "rank", self.rank, "at least 1")
        if self.norm_axis not in AXES:
            raise OptionError.of("dora", "norm_axis", self.norm_axis, f"one of {', '.join(AXES)}")

    def build(self, site: WeightSite) -> DoRAAdapter | InputDoRAAdapter:
        """A, B and m − ‖W‖ for one weight."""
        kind = DoRAAdapter if self.norm_axis == "output" else InputDoRAAdapter
        adapter = kind(site, self.rank, (self.alpha or self.rank) / self.rank)
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        return adapter

    def count(self, site: WeightSite) -> int:
        """rank·(d_in·k·k + d_out) / groups + d_out; rank·(d_in·k·k / groups + d_out) + d_out if all groups share A.

        With `norm_axis="input"` the last d_out becomes d_in / groups.
        """
        low = self.rank * math.prod(site.weight_shape[1:]) + site.d_out * self.rank // factor_pairs(site, self.rank)
        return low + magnitude_count(site, self.norm_axis)
