"""Head pruning: a trained gate for each attention head, and zero for the least important heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from veneer.functional.importance import PruningSchedule, largest_mask
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, WeightSite

SMOOTHING = 0.85


class HeadGates(Adapter):
    """x'_h = g_h·x_h for the slice x_h of each head at the input of the output projection, or W'_h = g_h·W_h for its columns.

    Args:
        width: number of channels at the input. `heads`: number of heads, a divisor of it.
    Shapes: `gates` (heads,). Training state: smoothed importance `sensitivity`, and `kept`, 0 for pruned heads.
    """

    training_buffers: ClassVar[tuple[str, ...]] = ("sensitivity", "kept")
    sensitivity: Tensor
    kept: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.gates = nn.Parameter(torch.ones(heads))
        self.register_buffer("sensitivity", torch.zeros(heads), persistent=False)
        self.register_buffer("kept", torch.ones(heads), persistent=False)

    def input(self, x: Tensor) -> Tensor:
        """g ∘ x, one gate for the channels of a head."""
        return x * self.gates.repeat_interleave(self.size)

    def weight(self, weight: Tensor) -> Tensor:
        """W diag(g)."""
        return weight * self.gates.repeat_interleave(self.size).to(weight.dtype)

    @torch.no_grad()
    def measure(self) -> None:
        """Adds |g · ∂L/∂g| to the smoothed importance."""
        if self.gates.grad is not None:
            self.sensitivity.mul_(SMOOTHING).add_((self.gates * self.gates.grad).abs(), alpha=1 - SMOOTHING)

    @torch.no_grad()
    def prune(self) -> None:
        """Sets g = 0 where `kept` is 0."""
        self.gates.mul_(self.kept)


@dataclass(frozen=True)
class HeadPruning(Method):
    """y = W (g ∘ x) + b, with one gate g_h for the channels of each head at the attention's output projection, 1 at first.

    Trains the gates. After a warm-up, the least important heads of all layers together are pruned, g_h = 0, by a cubic schedule,
    until `keep` of them remain; then the remaining gates are trained. Importance is |g_h · ∂L/∂g_h|, smoothed over
    steps. A merge writes the gates into W; the columns of pruned heads are then zero. `veneer transfer` and
    `veneer personalize` prune by themselves, and the best epoch is one after the last pruning; a custom training loop calls
    `tuned.after_step(step, steps)` after each step, else no head is pruned, and `tuned.finalize()` after EMA.

    Args:
        keep: share of the heads that remains, above 0 to 1; 1 only trains gates.
        at_least: heads that remain in every layer, at least 1.
        warmup: fraction of the steps before pruning starts, 0 to 1. `final`: fraction of the steps after it has ended.
        every: steps between two prunings; between them pruned gates are trained again.
    Counts: number of heads; ViT-B/16 144.
    Source: Kovaleva, Romanov, Rogers, Rumshisky, Revealing the Dark Secrets of BERT, EMNLP 2019 (disabled heads); Michel, Levy,
    Neubig, Are Sixteen Heads Really Better than One?, NeurIPS 2019, section 2.3 and equation 2 (gates and importance), and
    their code. Deviations: importance comes from the training batches, where Michel et al. average |∂L/∂g_h| at g = 1 over
    samples after training, their code the absolute value of each token, divided by the norm in each layer; pruning is gradual;
    disabled heads are zero, where Kovaleva et al. give them constant attention, 1 / number of tokens, which cannot be pruned
    from the weights (`veneer analyze heads` measures both).
    """

    name: ClassVar[str] = "head_pruning"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Kovaleva et al., Revealing the Dark Secrets of BERT, EMNLP 2019; Michel et al., NeurIPS 2019"
    needs: ClassVar[tuple[Need, ...]] = (
        Need(WeightSite, roles=("attn.out", "xattn.out"), where={"kind": ("linear",), "heads": ...}),
    )
    default: ClassVar[tuple[str, ...]] = ("attn.out", "xattn.out")
    fallback: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-2
    shared_options: ClassVar[tuple[str, ...]] = ("keep", "at_least", "warmup", "final", "every")

    keep: float = 0.75
    at_least: int = 1
    warmup: float = 0.1
    final: float = 0.4
    every: int = 5

    def __post_init__(self) -> None:
        checks = {
            "keep": (0 < self.keep <= 1, "above 0 and at most 1"),
            "at_least": (self.at_least >= 1, "at least 1"),
            "warmup": (self.warmup >= 0, "at least 0"),
            "final": (self.final >= 0 and self.warmup + self.final < 1, "from 0 to less than 1 - warmup"),
            "every": (self.every >= 1, "at least 1"),
        }
        OptionError.check(self, checks)

    def build(self, site: WeightSite) -> HeadGates:
        """Gates of 1 for the heads of one attention."""
        return HeadGates(site.d_in, site.heads or 1)

    def count(self, site: WeightSite) -> int:
        """Number of heads."""
        return site.heads or 1

    def after_step(self, adapters: Iterable[tuple[Site, Adapter]], step: int, steps: int) -> None:
        """Records the importance of the heads, and prunes to the budget when due."""
        layers = list(_own(adapters))
        schedule = self._schedule(steps)
        if schedule.measures(step):
            for layer in layers:
                layer.measure()
        if schedule.prunes(step):
            first = sum(len(layer.gates) for layer in layers)
            self._allocate(layers, schedule.budget(step, first, max(1, round(self.keep * first))))
        elif step < schedule.end:
            return
        for layer in layers:
            layer.prune()

    def schedule_end(self, steps: int) -> int:
        """Step of the last pruning."""
        return self._schedule(steps).end

    def _schedule(self, steps: int) -> PruningSchedule:
        return PruningSchedule(self.warmup, self.final, self.every, steps)

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Sets the gates of pruned heads to zero, which those of averaged weights (EMA) are not."""
        for layer in _own(adapters):
            layer.prune()
        return self

    def _allocate(self, layers: list[HeadGates], budget: int) -> None:
        """Keeps the most important heads of each layer, `at_least` of them, then the most important others, `budget` in all."""
        for layer in layers:
            layer.kept.zero_()
            layer.kept[layer.sensitivity.argsort(descending=True, stable=True)[: self.at_least]] = 1
        protected = sum(int(layer.kept.sum()) for layer in layers)
        scores = torch.cat([layer.sensitivity.masked_fill(layer.kept > 0, float("-inf")).cpu() for layer in layers])
        kept = largest_mask(scores, max(0, budget - protected))
        for layer, part in zip(layers, kept.split([len(layer.gates) for layer in layers]), strict=True):
            layer.kept.add_(part.to(layer.kept.device)).clamp_(max=1)

    def summary(self, adapters: Iterable[tuple[Site, Adapter]]) -> str:
        """How many heads are pruned."""
        layers = list(_own(adapters))
        pruned = sum(int((layer.gates == 0).sum()) for layer in layers)
        total = sum(len(layer.gates) for layer in layers)
        return f"{pruned} of {total} heads are pruned"


def _own(adapters: Iterable[tuple[Site, Any]]) -> Iterator[HeadGates]:
    for _, adapter in adapters:
        if isinstance(adapter, HeadGates):
            yield adapter
