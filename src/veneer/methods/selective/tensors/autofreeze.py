"""AutoFreeze: full fine-tuning that freezes leading blocks whose gradients have stopped changing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection.errors import OptionError, StateError
from veneer.injection.sites import ParamSite, WeightSite

from ._replacement import ReplacementAdapter
from .full import Full


class FreezableAdapter(ReplacementAdapter):
    """W' = V, trained until it is frozen.

    Attributes:
        total: sum of dL/dV over the steps of the interval. `norm`: (), its L1 norm in the last interval, -1 before.
        frozen, step: (), whether V is frozen, and the number of finished steps. All four are in checkpoints only.
        has_begun: True after the first `begin_pass`.
    """

    training_buffers: ClassVar[tuple[str, ...]] = ("total", "norm", "frozen", "step")
    total: Tensor
    norm: Tensor
    frozen: Tensor
    step: Tensor

    def __init__(self, site: WeightSite | ParamSite) -> None:
        super().__init__(site)
        self.has_begun = False
        self._frozen_version: tuple[int, int] | None = None
        self.register_buffer("total", torch.zeros_like(self.value), persistent=False)
        self.register_buffer("norm", torch.full((), -1.0), persistent=False)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def weight(self, weight: Tensor) -> Tensor:
        """V.

        Raises:
            StateError: a training pass in a loop that does not call `begin_pass`, so that no block would ever be frozen.
        """
        if not self.has_begun and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            message = (
                f"{self.site.name}: a training pass without a schedule. Call attachment.begin_pass(seed, step) before each "
                "forward pass and attachment.after_step(step, steps) after each step, or train with the method full."
            )
            raise StateError(message, where=self.site.name, given="training", expected="begin_pass")
        return self.value

    def begin(self) -> None:
        """Follows `frozen`, which a checkpoint may have changed. Its value is read only if it was modified."""
        version = id(self.frozen), self.frozen._version
        if version != self._frozen_version and not self.frozen.is_meta:
            self.value.requires_grad_(not bool(self.frozen))
            self._frozen_version = version
        self.has_begun = True

    @torch.no_grad()
    def accumulate(self, step: int) -> None:
        """Adds the gradient of a finished step."""
        self.step.fill_(step)
        if self.value.grad is not None:
            self.total.add_(self.value.grad)


@dataclass(frozen=True)
class AutoFreeze(Full):
    """W' = V as in `full`; at the end of each interval of the run, leading blocks may be frozen for the rest of it.

    Of block l in interval t, g_l(t) = ‖Σ dL/dV_l‖₁, the sum over the steps of the interval, and the change is
    r_l = |g_l(t−1) − g_l(t)| / g_l(t−1). From the second interval on, the first block that is not frozen with r_l at or above the
    percentile of all these blocks becomes the first trained one. The blocks before it and what precedes all blocks, such as the
    patch embedding, are frozen: their tensors have no gradient and no update, and the backward pass ends at the first trained
    block, so a step needs less time and memory (`veneer bench --rows freezing`). Blocks are those of each tower by their depth.

    Args:
        intervals: number of intervals of the run, at least 2; those of a run with fewer steps have one step.
        percentile: percentile of the relative change of the gradient over the blocks that are not frozen, 0 to 100; leading
            blocks below it are frozen, so a higher one freezes more blocks at once, 0 none.
    `veneer transfer` and `veneer personalize` keep the schedule. A custom training loop calls `tuned.begin_pass(seed, step)`
    before each forward pass, with steps from 0, and `tuned.after_step(step, steps)` after each step, with steps from 1; without
    them a training pass is an error. Training needs another tensor of V's size, the sum of gradients. A tower without blocks is
    trained whole.
    Counts: as `full`; ViT-B/16 without a head 85,798,656. A file holds all V.
    Source: Liu, Agarwal, Venkataraman, AutoFreeze: Automatically Freezing Model Blocks to Accelerate Fine-tuning, 2021, section
    4, and the authors' code (`freeze_intermediate_e2e_lr.py`), with 10 intervals and the 50th percentile. Deviations: gradients
    are summed after their norm is clipped; the optimizer state of trained blocks is kept, where the code builds a new optimizer;
    frozen blocks stay frozen, where the code begins its search at block 0; their dropout is that of the model's mode; the
    learning rate follows the schedule of the run, where the code divides it at 30 % and 60 %; the inputs of the first
    trained block are not cached, because augmentation and noise change them.
    """

    name: ClassVar[str] = "autofreeze"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Liu, Agarwal, Venkataraman, AutoFreeze, 2021"
    shared_options: ClassVar[tuple[str, ...]] = ("intervals", "percentile")

    intervals: int = 10
    percentile: float = 50.0

    def __post_init__(self) -> None:
        if not self.head_rate > 0:
            raise OptionError.of(self.name, "head_rate", self.head_rate, "above 0")
        if self.intervals < 2:
            raise OptionError.of(self.name, "intervals", self.intervals, "at least 2")
        if not 0 <= self.percentile <= 100:
            raise OptionError.of(self.name, "percentile", self.percentile, "0 to 100")

    def build(self, site: WeightSite | ParamSite) -> FreezableAdapter:
        """A tensor of the host's shape."""
        return FreezableAdapter(site)

    def begin_pass(self, adapters: Iterable[tuple[Any, Any]], seed: int, step: int, number: int) -> None:
        """Freezes what the schedule has frozen.

        Raises:
            StateError: `after_step` was not called after the previous step.
        """
        parts = [adapter for _, adapter in adapters if isinstance(adapter, FreezableAdapter)]
        before = step if parts[0].step.is_meta else int(parts[0].step)
        if step > before:
            message = (
                f"autofreeze: step {step} begins after {before} finished steps. Call attachment.after_step(step, steps) "
                "after each optimizer step, before the gradients are cleared."
            )
            raise StateError(message, where=parts[0].site.name, given=before, expected=step)
        for adapter in parts:
            adapter.begin()

    def after_step(self, adapters: Iterable[tuple[Any, Any]], step: int, steps: int) -> None:
        """Sums the gradients, and freezes blocks at the end of an interval."""
        parts = list(adapters)
        for _, adapter in parts:
            adapter.accumulate(step)
        if step % max(1, steps // self.intervals) == 0:
            for blocks in towers_of(parts):
                self._end_interval(blocks)

    @torch.no_grad()
    def _end_interval(self, blocks: Sequence[Sequence[FreezableAdapter]]) -> None:
        """Compares the gradients of the blocks of a tower with those of the interval before. `blocks`: see `towers_of`."""
        before, now = _norms(blocks, measure=False), _norms(blocks, measure=True)
        active = [i for i, block in enumerate(blocks) if i and not bool(block[0].frozen)]
        if before is None or now is None or not active:
            return
        ratios = torch.tensor([abs(before[i] - now[i]) / (before[i] or now[i] or 1.0) for i in active], dtype=torch.float64)
        threshold = torch.quantile(ratios, self.percentile / 100)
        first = active[int((ratios >= threshold).nonzero()[0])]
        for adapter in (adapter for block in blocks[:first] if first > 1 for adapter in block):
            adapter.frozen.fill_(True)

    def summary(self, adapters: Iterable[tuple[Any, Any]]) -> str:
        """How many blocks are frozen."""
        blocks = [block for tower in towers_of(adapters) for block in tower[1:] if not block[0].frozen.is_meta]
        return f"{sum(bool(block[0].frozen) for block in blocks)} of {len(blocks)} blocks frozen" if blocks else ""


def towers_of(adapters: Iterable[tuple[Any, FreezableAdapter]]) -> Iterator[list[list[FreezableAdapter]]]:
    """Of each tower with blocks: the adapters before its blocks, and those of each block, first to last."""
    towers: dict[tuple[str, str], list[tuple[Any, FreezableAdapter]]] = {}
    for site, adapter in adapters:
        towers.setdefault((site.component, site.tower), []).append((site, adapter))
    for parts in towers.values():
        places = [place for place, (site, _) in enumerate(parts) if site.depth is not None]
        if places:
            leading = [adapter for site, adapter in parts[: places[0]] if site.depth is None]
            blocks: dict[int, list[FreezableAdapter]] = {}
            for site, adapter in parts:
                if site.depth is not None:
                    blocks.setdefault(site.depth, []).append(adapter)
            yield [leading, *(blocks[depth] for depth in sorted(blocks))]


def _norms(blocks: Sequence[Sequence[FreezableAdapter]], measure: bool) -> list[float] | None:
    """Norms of the blocks in the last interval, or `measure` of this one, which begins the next; None before the first."""
    if measure:
        for adapter in (adapter for block in blocks for adapter in block):
            adapter.norm.copy_(adapter.total.abs().sum())
            adapter.total.zero_()
    device = blocks[1][0].norm.device
    rows = [[adapter.norm.to(device) for adapter in block] for block in blocks]
    sums = torch.stack([torch.stack(row).sum() if row else torch.zeros((), device=device) for row in rows]).tolist()
    return None if any(value < 0 for value in sums) else sums
