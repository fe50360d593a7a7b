"""LION: implicit layers before and after a frozen model, whose outputs are the fixed points of a bottleneck."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from veneer.functional.importance import largest_mask
from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import FeatureSite, Site, StreamSite

SMOOTHING = 0.85


class ImplicitLayer(Adapter):
    """y' = y + z* with z* = Up tanh(Down(LN(y) + z*)).

    Shapes: `down` (h, width), `up` (width, h), `down_bias` (h,), `up_bias` (width,). Training state: smoothed importance and mask
    of the weights, `down_scores`, `down_kept`, `up_scores` and `up_kept`.
    """

    applies_strength: ClassVar[bool] = True
    input_port: ClassVar[Literal["enter"]] = "enter"
    training_buffers: ClassVar[tuple[str, ...]] = ("down_scores", "down_kept", "up_scores", "up_kept")
    down_kept: Tensor
    up_kept: Tensor

    def __init__(self, width: int, options: Lion) -> None:
        super().__init__()
        self.steps, self.contraction = options.steps, options.contraction
        self.down = nn.Parameter(torch.empty(options.bottleneck, width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(zeros(width, options.bottleneck))
        self.down_bias = nn.Parameter(zeros(options.bottleneck))
        self.up_bias = nn.Parameter(zeros(width))
        for name, weight in (("down", self.down), ("up", self.up)):
            self.register_buffer(f"{name}_scores", torch.zeros(weight.shape), persistent=False)
            self.register_buffer(f"{name}_kept", torch.ones(weight.shape), persistent=False)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the tokens or features, (…, width), which are y in the adapter's dtype."""
        down, up = self.contracted()
        inner, bias = down @ up, down @ self.up_bias + self.down_bias
        first = F.linear(F.layer_norm(x, x.shape[-1:]), down, bias)
        a = first
        for _ in range(self.steps):
            a = first + F.linear(a.tanh(), inner)
        return y + self.strength * F.linear(a.tanh(), up, self.up_bias)

    def contracted(self) -> tuple[Tensor, Tensor]:
        """Down and Up, divided so that the product of their norms, a bound of the slope, is `contraction` at most."""
        slope = self.down.norm() * self.up.norm()
        factor = (self.contraction / slope.clamp(min=self.contraction)).sqrt()
        return self.down * factor, self.up * factor

    @torch.no_grad()
    def measure(self) -> None:
        """Adds |w · ∂L/∂w| to the smoothed importance of the weights."""
        for name in ("down", "up"):
            weight = getattr(self, name)
            if weight.grad is not None:
                scores = getattr(self, f"{name}_scores")
                scores.mul_(SMOOTHING).add_((weight * weight.grad).abs(), alpha=1 - SMOOTHING)

    @torch.no_grad()
    def prune(self) -> None:
        """Sets pruned weights to zero."""
        self.down.mul_(self.down_kept)
        self.up.mul_(self.up_kept)


@dataclass(frozen=True)
class Lion(Method):
    """y' = y + z* with z* = Up tanh(Down(LN(y) + z*)): an implicit layer before the first block, and one at the pooled features.

    LN has no parameters, Down and Up have biases and are divided so that ‖Down‖·‖Up‖ ≤ `contraction`: then z* exists, is
    unique, and `steps` steps from z = 0 reach it up to a factor of contraction to the power of steps. They are computed in the
    h features of the bottleneck, a = Down(LN(y) + Up tanh(a)), so that memory and time are those of a bottleneck adapter; the
    gradient is that of the steps, which is the implicit one in the limit. Up is zero initially: a new adapter leaves the
    output unchanged.

    After a part of the steps of a run, the weights of Down and Up with the smallest |w · ∂L/∂w| (smoothed) become zero and
    stay so. `veneer transfer` does this by itself; a custom training loop calls `tuned.after_step(step, steps)` after each step.

    Args:
        bottleneck: h, at least 1.
        contraction: bound of the slope of the map, above 0 and below 1. `steps`: steps to the fixed point, at least 1.
        keep: share of the weights that remains, above 0 to 1, in each of Down and Up; 1 prunes nothing.
        prune_at: fraction of the steps before the pruning, above 0 to 1.
    Models without pooled features have the first layer only, and convolutional ones without channels last only the second one.
    Counts: 2·width·h + h + width per layer; ViT-B/16 with h = 64 198,272. Pruned weights are counted.
    Source: Wang et al., LION: Implicit Vision Prompt Tuning, AAAI 2024. The authors have published no code, and only the
    abstract and a figure were available: two equilibrium layers around a frozen model, and parameters pruned by a criterion of
    the lottery ticket hypothesis, are theirs; the map, the solver, the norms, initial values, the moment of the pruning and
    all defaults are chosen here. Results of the paper should not be expected of this method.
    """

    name: ClassVar[str] = "lion"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Wang et al., LION: Implicit Vision Prompt Tuning, AAAI 2024"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(StreamSite, roles=("block",), where={"layout": ("NLC", "NHWC"), "d_in": 0}),
        Need(FeatureSite, roles=("features",)),
    )
    default: ClassVar[tuple[str, ...]] = ("block@0", "features")
    fallback: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("keep", "prune_at")

    bottleneck: int = 64
    contraction: float = 0.7
    steps: int = 20
    keep: float = 0.5
    prune_at: float = 0.5

    def __post_init__(self) -> None:
        checks = {
            "bottleneck": (self.bottleneck >= 1, "at least 1"),
            "contraction": (0 < self.contraction < 1, "above 0 and below 1"),
            "steps": (self.steps >= 1, "at least 1"),
            **{option: (0 < getattr(self, option) <= 1, "above 0 and at most 1") for option in ("keep", "prune_at")},
        }
        OptionError.check(self, checks)

    def build(self, site: StreamSite | FeatureSite) -> ImplicitLayer:
        """The implicit layer at one place."""
        return ImplicitLayer(site.width, self)

    def count(self, site: StreamSite | FeatureSite) -> int:
        """2·width·h + h + width."""
        return 2 * site.width * self.bottleneck + self.bottleneck + site.width

    def schedule_end(self, steps: int) -> int:
        """Step of the pruning."""
        return max(1, round(self.prune_at * steps)) if self.keep < 1 else 0

    def after_step(self, adapters: Iterable[tuple[Site, Any]], step: int, steps: int) -> None:
        """Records the importance of the weights, prunes them when due, then keeps them at zero."""
        due = self.schedule_end(steps)
        for _, layer in adapters if due else ():
            if step <= due:
                layer.measure()
            if step == due:
                for name in ("down", "up"):
                    scores = getattr(layer, f"{name}_scores")
                    mask = largest_mask(scores.flatten(), max(1, round(self.keep * scores.numel())))
                    getattr(layer, f"{name}_kept").copy_(mask.view_as(scores))
            if step >= due:
                layer.prune()

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Sets pruned weights to zero, which those of averaged weights (EMA) are not."""
        for _, layer in adapters:
            layer.prune()
        return self

    def summary(self, adapters: Iterable[tuple[Site, Any]]) -> str:
        """How many weights are zero."""
        weights = [weight for _, layer in adapters for weight in (layer.down, layer.up) if not weight.is_meta]
        if self.keep == 1 or not weights:
            return ""
        return f"{sum(int((w == 0).sum()) for w in weights):,} of {sum(w.numel() for w in weights):,} weights are zero"
