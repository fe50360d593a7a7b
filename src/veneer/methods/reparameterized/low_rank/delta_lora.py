"""Delta-LoRA: a LoRA whose base weight moves along with the change of the product of its factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.functional.convolve import convolve
from veneer.functional.low_rank_autograd import add_product
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, WeightSite
from veneer.methods.reparameterized._state_transfer import lora_state

from ._low_rank import LoRAAdapter, join_pairs
from .lora import LoRA


class DeltaLoRAAdapter(LoRAAdapter):
    """W' = W + s·B A + g·s·(B A − B0 A0), where the last term, the moved part of the base weight, has no gradient.

    `down0`, `up0` are A and B when the base weight starts to move. `gain`, (), is g: 0 before, the ratio λ after. All are saved.
    """

    down0: Tensor
    up0: Tensor
    gain: Tensor

    def __init__(self, site: WeightSite, rank: int, scaling: float) -> None:
        super().__init__(site, rank, scaling, dropout=0.0)
        for name in ("down", "up"):
            self.register_buffer(f"{name}0", torch.zeros(getattr(self, name).shape))
        self.register_buffer("gain", torch.zeros(()))

    def is_moving(self, ratio: float) -> bool:
        """True if the base weight moves already, as after a file was loaded.

        Raises:
            OptionError: it moves with another ratio.
        """
        given = float(self.gain)
        if given and given != float(torch.tensor(ratio, dtype=self.gain.dtype)):
            message = (
                f"delta_lora: {self.site.name} was trained with ratio {given:g}, not {ratio:g}. Set ratio to that of the file."
            )
            raise OptionError(message, option="ratio", method="delta_lora", where=self.site.name, given=ratio, expected=given)
        return given != 0

    @torch.no_grad()
    def start_moving(self, ratio: float, from_zero: bool) -> None:
        """Records B A as the product at which the base weight starts to move; with `from_zero` it stays the initial one."""
        if not from_zero:
            self.down0.copy_(self.down)
            self.up0.copy_(self.up)
        self.gain.fill_(ratio)

    def own_pair(self) -> tuple[Tensor, Tensor]:
        """A stacked on A0, and (1 + g)·B beside −g·B0: rank 2r. The gradients are those of s·B A alone.

        B becomes B + g·B̄ and A becomes A + (1 − 1 / (1 + g))·(Ā − A), with B̄ and Ā constants equal to B and A.
        """
        down, up, gain = self.down.detach(), self.up.detach(), self.gain
        down = self.down + (1 - 1 / (1 + gain)) * (down - self.down)
        return join_pairs(self, (down, self.down0), (self.up + gain * up, -gain * self.up0))

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """x: input of the module. `y`: its output. `overwrite`: y is modified in place."""
        if self.pairs != self.site.groups:
            return super().output(x, y, overwrite)
        down, up = self.own_pair()
        low = self._low(x, down) * (self.strength * self.scaling)
        if self.site.groups == 1:
            return add_product(y, low, up, overwrite)
        return y + convolve(low, up, groups=self.site.groups)

    def state_from(self, other: Any | None) -> dict[str, Tensor]:
        """State with which this makes the update of `other`, or none. `ValueError` if its factors exceed this rank."""
        if other is None:
            return lora_state(self, None)
        now, start = (
            lora_state(self, SimpleNamespace(down=down, up=up, scaling=other.scaling, pairs=other.pairs))
            for down, up in ((other.down, other.up), (other.down0, other.up0))
        )
        if not other.gain:  # its base weight has not moved: it may start to, at the product of the file
            start = now
        return {**now, "down0": start["down"], "up0": start["up"], "gain": other.gain}


@dataclass(frozen=True)
class DeltaLoRA(Method):
    """W' = Wₜ + s·Bₜ Aₜ with s = alpha / rank: after each step t > K, Wₜ = Wₜ₋₁ + λ·s·(Bₜ Aₜ − Bₜ₋₁ Aₜ₋₁); A and B are trained.

    The base weight gets no gradient and no optimizer state. Its tensor is never written: the changes add up to
    λ·s·(B A − B_K A_K), so the adapter keeps B_K and A_K, from before the first of them, and W' − W has rank 2·`rank`.

    `veneer personalize` and `veneer transfer` do all of this. A custom training loop calls `tuned.after_step(step, steps)`, with
    `step` from 1 to `steps`, after each optimizer step. Without it this is a LoRA. A run that continues from a file whose base
    weight has moved moves it from the first step on, and needs the file's `ratio`.

    Args:
        rank: rank r of A and B, at least 1.
        alpha: numerator of the scale s (default: the rank, so that s = 1).
        ratio: λ, at least 0; with 0 this is a LoRA.
        warmup: K as a fraction of the steps of the run, 0 to 1: until then the base weight does not move.
    There is no dropout: with it, the gradient of B A would not be that of W.
    Convolutions and embeddings: as `lora`. Weight decay of A and B reaches W by the change of B A.
    Counts: those of `lora`; ViT-B/16's q and v, rank 8: 294,912. Files also have A_K and B_K, as large as A and B.
    Source: Zi et al., Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, 2023; there is no
    public code of the authors. Deviations: K is a fraction of the run, so that short runs move the base weight too; the
    defaults of λ and K are chosen here; the sum of the changes is computed as one difference, which differs in rounding only.
    """

    name: ClassVar[str] = "delta_lora"
    uses: ClassVar[tuple[str, ...]] = ("few_photos", "classification")
    paper: ClassVar[str] = "Zi et al., Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn")
    learning_rate: ClassVar[float] = 1e-3
    shared_options: ClassVar[tuple[str, ...]] = ("warmup",)

    rank: int = 8
    alpha: float | None = None
    ratio: float = 2.0
    warmup: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError.of(self.name, "rank", self.rank, "at least 1")
        if not self.ratio >= 0:
            raise OptionError.of(self.name, "ratio", self.ratio, "at least 0")
        if not 0 <= self.warmup <= 1:
            raise OptionError.of(self.name, "warmup", self.warmup, "0 to 1")

    def _lora(self) -> LoRA:
        return LoRA(rank=self.rank, alpha=self.alpha)

    def build(self, site: WeightSite) -> DeltaLoRAAdapter:
        """A and B with the initial values of `lora`."""
        one = self._lora().build(site)
        adapter = DeltaLoRAAdapter(site, self.rank, one.scaling)
        adapter.down, adapter.up = one.down, one.up
        return adapter

    def count(self, site: WeightSite) -> int:
        """Number of parameters in A and B."""
        return self._lora().count(site)

    def after_step(self, adapters: Iterable[tuple[Site, Adapter]], step: int, steps: int) -> None:
        """Starts to move the base weights after step K; with K = 0 from the first step on."""
        start = round(self.warmup * steps)
        if step not in (1, start):
            return
        for site, adapter in adapters:
            assert isinstance(adapter, DeltaLoRAAdapter)
            here: Any = self.at(site)
            if not adapter.is_moving(here.ratio) and step >= start:
                adapter.start_moving(here.ratio, from_zero=start == 0)
