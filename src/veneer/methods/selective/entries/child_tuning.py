"""Child-Tuning: trains a part of the weights, a new random one in each step (F) or that of the largest Fisher information (D)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, WeightSite

from ._entries import Entries, SparseAdapter, count_entries, describe, size_of
from ._scores import accumulate_gradients, select_highest

Mode = Literal["D", "F"]


class RandomChildAdapter(Adapter):
    """W' = W + `delta`; each step, an entry of the gradient is kept with probability p and divided by p, else zero.

    Attributes:
        step: (), number of finished steps; in checkpoints only.
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True
    training_buffers: ClassVar[tuple[str, ...]] = ("step",)
    step: Tensor

    def __init__(self, shape: Sequence[int], keep_ratio: float, seed: int, name: str) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(*shape))
        self.keep_ratio, self.seed, self.name = keep_ratio, seed, name
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def weight(self, weight: Tensor) -> Tensor:
        """W + delta."""
        delta: Tensor = self.delta
        if torch.is_grad_enabled() and self.training and not torch.compiler.is_compiling():
            delta = delta.view_as(delta)
            delta.register_hook(self.masked)
        return weight + delta * self.strength

    def masked(self, gradient: Tensor) -> Tensor:
        """The gradient with Bernoulli(p) / p on each entry, of this step: the same in every pass and on every device."""
        draw = torch.Generator().manual_seed(_seed(self.seed, int(self.step), self.name))
        kept = torch.rand(gradient.shape, generator=draw) < self.keep_ratio
        return gradient * kept.to(gradient.device) / self.keep_ratio


def _seed(*parts: object) -> int:
    """A seed that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _clipped(gradient: Tensor, most: float) -> Tensor:
    """The gradient, scaled down to the norm `most` if it is larger, as torch clips it; 0 for no limit."""
    return gradient * (most / (gradient.norm() + 1e-6)).clamp(max=1) if most else gradient


@dataclass(frozen=True)
class ChildTuning(Method):
    """W' = W + ΔW, where only a child network of W is updated.

    D: ΔW is nonzero at the `keep_ratio` of entries with the largest F = Σ_b (dL_b/dW)², the sum over mini-batches, selected once
    before training among all weights of a tower. F: every entry is trained, with the gradient g ∘ m / keep_ratio, where the
    elements of m are Bernoulli(keep_ratio), new in each step, a function of seed, step and site. ΔW is initialized to zero.

    Args:
        mode: `D` or `F`.
        keep_ratio: part of the entries in the child network, above 0, at most 1.
        samples: samples for the scores of D, at least 1. `batch`: samples of each mini-batch of the scores, at least 1.
        max_grad_norm: largest norm of a mini-batch's gradient of one weight in the scores; 0 for no limit.
        seed: of the masks of F.
    A custom training loop calls `after_step` with F.
    Counts: D floor(keep_ratio · entries), ViT-B/16's block linears 16,986,931; F all entries, 84,934,656.
    Source: Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, EMNLP 2021,
    sections 2.1 and 2.2, with the default of D from the middle of its range (0.1 to 0.3). Deviations: only the entries of D
    have optimizer state, so weight decay acts on their ΔW and on no frozen weight, whereas the authors' optimizer decays all
    weights; a threshold by count in place of a percentile, so ties do not add entries; `samples` in place of the whole
    training set; F masks gradients before their norm is clipped, and with `torch.compile` not at all, so compile D only.
    """

    name: ClassVar[str] = "child_tuning"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Xu et al., Raise a Child in Large Language Model, EMNLP 2021"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite), Need(ParamSite))
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    learning_rate: ClassVar[float] = 1e-4
    selects: ClassVar[bool] = True
    shared_options: ClassVar[tuple[str, ...]] = ("mode", "keep_ratio", "samples", "batch", "max_grad_norm", "seed")

    mode: Mode = "D"
    keep_ratio: float = 0.2
    samples: int = 256
    batch: int = 16
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise OptionError.of(self.name, "mode", self.mode, "D or F")
        if not 0 < self.keep_ratio <= 1:
            raise OptionError.of(self.name, "keep_ratio", self.keep_ratio, "above 0 and at most 1")
        for option in ("samples", "batch"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")
        if not self.max_grad_norm >= 0:
            raise OptionError.of(self.name, "max_grad_norm", self.max_grad_norm, "at least 0")

    def build_shared(self, sites: Sequence[WeightSite | ParamSite]) -> Entries | None:
        """The entries of all sites of a tower; None for F."""
        if self.mode == "F":
            return None
        sizes = [size_of(site) for site in sites]
        return Entries(sizes, count_entries(sizes, self.keep_ratio), [site.name for site in sites])

    def build(self, site: WeightSite | ParamSite) -> SparseAdapter | RandomChildAdapter:
        """The adapter of one weight."""
        if self.mode == "D":
            return SparseAdapter(site.name)
        shape = site.weight_shape if isinstance(site, WeightSite) else site.shape
        return RandomChildAdapter(shape, self.keep_ratio, self.seed, site.name)

    def select(self, adapters: Sequence[tuple[Any, Adapter]], losses: Iterable[Tensor]) -> None:
        """Selects the entries of D."""
        parts = [(site, adapter) for site, adapter in adapters if isinstance(adapter, SparseAdapter)]
        if parts:
            term = lambda gradient: _clipped(gradient, self.max_grad_norm).square()  # noqa: E731
            select_highest(parts, accumulate_gradients(self.name, parts, losses, self.samples, term, self.batch))

    def after_step(self, adapters: Iterable[tuple[Any, Adapter]], step: int, steps: int) -> None:
        """Counts the steps of F."""
        for _, adapter in adapters:
            if isinstance(adapter, RandomChildAdapter):
                adapter.step.fill_(step)

    def count(self, site: WeightSite | ParamSite) -> int:
        """Of F the entries of the weight; those of D belong to all sites together."""
        return size_of(site) if self.mode == "F" else 0

    def summary(self, adapters: Iterable[tuple[Any, Adapter]]) -> str:
        """The number of selected entries of D."""
        return describe(adapter for _, adapter in adapters) if self.mode == "D" else ""

    @classmethod
    def examples(cls) -> tuple[ChildTuning, ChildTuning]:
        """Both with a selection."""
        return cls(keep_ratio=0.4), cls(keep_ratio=0.3)
