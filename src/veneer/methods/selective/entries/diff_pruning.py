"""Diff pruning: a sparse update of the weights, found by gates with an L0 penalty and trained on with its entries fixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from veneer.injection.errors import NotSelected, OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, WeightSite

from ._entries import Entries, SparseAdapter, count_entries, describe, size_of
from ._gated_update import GatedUpdate, by_tower, fix_largest, is_fixed, store_entries

Groups = Literal["tensor", "row", "none"]
Phase = Literal["search", "fixed"]


@dataclass(frozen=True)
class DiffPruning(Method):
    """W' = W + z_g ∘ z ∘ w with hard concrete gates, z for each entry and z_g for each group; then W' = W + m ∘ w, m fixed.

    z = min(1, max(0, σ(a + log u − log(1 − u))·(upper − lower) + lower)) with u uniform, and z_g in the same way with a_g. The
    loss has the term sparsity_penalty · Σ σ(a − log(−lower / upper)) over all gates. After `search` of the steps, exactly
    floor(keep_ratio · entries) entries with the largest |z_g z w| among all selected weights of a tower remain, and the other
    steps train them alone. w is initialized to zero, a and a_g to `initial_logit`. In evaluation u is 1/2. A file of a
    finished run has the values of the entries and their indices, and its `phase` is `fixed`; until then a file has w and all a.

    Args:
        keep_ratio: part of the entries that remains, above 0, at most 1.
        gate_groups: entries with a common gate: `tensor` for a whole weight, `row` for an output channel, `none` for no z_g.
        search: part of the run that searches entries with gates, above 0, at most 1; 1 leaves no step for the fixed entries.
        sparsity_penalty: weight of the expected number of open gates, at least 0.
        initial_logit: initial value of the logits a and a_g of the gates; 5 opens a gate with probability 0.993.
        lower: lower end of the interval of a gate before it is clamped, below 0. `upper`: its upper end, above 1.
        gate_rate: ratio of the gates' learning rate to that of w, above 0.
        phase: 'search' in a new run; 'fixed' in the file of a finished run, whose entries can be trained further.
    Training needs w, a, their noise, their gradients and their optimizer states, each of W's size. A custom training loop calls
    `tuned.begin_pass(seed, step)` before each forward pass, which samples u, adds `tuned.penalty()` to the loss, and calls
    `tuned.after_step(step, steps)` after each step and `tuned.finalize()` after the last one. Averaged weights (EMA) average w.
    Counts: 2 · entries + groups in training, floor(keep_ratio · entries) of a finished run; ViT-B/16's block linears 169,869,384
    with one gate for each of the 72 weights, then 424,673; with `where="*"` 428,993 remain.
    Source: Guo, Rush, Kim, Parameter-Efficient Transfer Learning with Diff Pruning, ACL 2021, sections 3.1 to 3.3, and the
    authors' code (`run_glue_diffpruning.py`, `run_glue_mag.py`, `run_glue_fixmask_finetune.py`): its interval, initial logits,
    penalty, learning rates of 5e-5 and 0.1, no weight decay of gates. Deviations: evaluation before the entries are fixed uses
    no noise; the optimizer state is kept when they are fixed, where the authors begin a new run; the entries are selected by
    count in place of a threshold, so that ties do not add entries; the gradients of w and of the gates are clipped together; q,
    k and v of a fused weight are three tensors; by default biases, norms and embeddings are not among the entries; a head is
    trained beside; each tower of a pipeline has its own share.
    """

    name: ClassVar[str] = "diff_pruning"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Guo, Rush, Kim, Parameter-Efficient Transfer Learning with Diff Pruning, ACL 2021"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite), Need(ParamSite))
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    learning_rate: ClassVar[float] = 5e-5
    shared_options: ClassVar[tuple[str, ...]] = ("keep_ratio", "search", "sparsity_penalty", "gate_rate", "phase")

    keep_ratio: float = 0.005
    gate_groups: Groups = "tensor"
    search: float = 0.5
    sparsity_penalty: float = 1.25e-7
    initial_logit: float = 5.0
    lower: float = -1.5
    upper: float = 1.5
    gate_rate: float = 2000.0
    phase: Phase = "search"

    def __post_init__(self) -> None:
        checks = {
            "keep_ratio": (0 < self.keep_ratio <= 1, "above 0 and at most 1"),
            "gate_groups": (self.gate_groups in get_args(Groups), f"one of {', '.join(get_args(Groups))}"),
            "search": (0 < self.search <= 1, "above 0 and at most 1"),
            "sparsity_penalty": (self.sparsity_penalty >= 0, "at least 0"),
            "initial_logit": (math.isfinite(self.initial_logit), "a finite number"),
            "lower": (self.lower < 0, "below 0"),
            "upper": (self.upper > 1, "above 1"),
            "gate_rate": (self.gate_rate > 0, "above 0"),
            "phase": (self.phase in get_args(Phase), f"one of {', '.join(get_args(Phase))}"),
        }
        OptionError.check(self, checks)

    def build_shared(self, sites: Sequence[WeightSite | ParamSite]) -> Entries | None:
        """The entries of a finished run; None in `search`."""
        if self.phase == "search":
            return None
        sizes = [size_of(site) for site in sites]
        return Entries(sizes, count_entries(sizes, self.keep_ratio), [site.name for site in sites])

    def build(self, site: WeightSite | ParamSite) -> SparseAdapter:
        """The update and the gates of one weight; those of a finished run are in the shared entries."""
        if self.phase == "fixed":
            return SparseAdapter(site.name)
        shape = shape_of(site)
        return GatedUpdate(site.name, shape, self._group_shape(shape), self.initial_logit, self.lower, self.upper)

    def _group_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Shape of the gates of groups; None without them."""
        if self.gate_groups == "none":
            return None
        return (*shape[: self.gate_groups == "row"], *(1 for _ in shape[self.gate_groups == "row" :]))

    def groups(self, adapters: Iterable[tuple[Any, Adapter]]) -> list[dict[str, Any]]:
        """The updates, and the gates with their learning rate and no weight decay."""
        by_id = {id(p): (name, p) for _, adapter in adapters for name, p in adapter.named_parameters()}
        gates, updates = ([p for name, p in by_id.values() if name.endswith("logits") == flag] for flag in (True, False))
        return [{"params": updates, "lr_scale": 1.0}, {"params": gates, "lr_scale": self.gate_rate, "weight_decay": 0.0}]

    def begin_pass(self, adapters: Iterable[tuple[Any, Any]], seed: int, step: int, number: int) -> None:
        """Samples the gates of a training pass.

        Raises:
            NotSelected: `phase` is `fixed`, but no file was loaded.
        """
        parts = list(adapters)
        for tower in by_tower(parts):
            fixed = is_fixed(tower)
            for adapter in tower:
                adapter.omit_noise() if fixed else adapter.sample_noise(seed, step, number)
        if self.phase == "fixed" and not all(adapter.is_selected for _, adapter in parts[:1]):
            message = "diff_pruning: phase 'fixed' trains the entries of a file; load it, or set phase to 'search'"
            raise NotSelected(message, where="phase", given=self.name, expected="search")

    def penalty(self, adapters: Iterable[tuple[Any, Adapter]]) -> Tensor | None:
        """sparsity_penalty · expected number of open gates; None once the entries are fixed."""
        towers = [tower for tower in by_tower(adapters) if not is_fixed(tower)]
        if not towers:
            return None
        counts = [adapter.expected_open() for tower in towers for adapter in tower]
        return self.sparsity_penalty * torch.stack([count.to(counts[0].device) for count in counts]).sum()

    def after_step(self, adapters: Iterable[tuple[Any, Adapter]], step: int, steps: int) -> None:
        """Fixes the entries after the last step with gates."""
        if step < self._last_search(steps):
            return
        for tower in by_tower(adapters):
            if not is_fixed(tower):
                fix_largest(tower, self._count(tower))

    def _last_search(self, steps: int) -> int:
        """The last step with gates."""
        return min(steps, max(1, round(self.search * steps)))

    def _count(self, tower: Sequence[GatedUpdate]) -> int:
        """Number of entries that remain in a tower."""
        return count_entries([adapter.kept.numel() for adapter in tower], self.keep_ratio)

    def schedule_end(self, steps: int) -> int:
        """The step that fixes the entries."""
        return self._last_search(steps) if self.phase == "search" else 0

    def finalize(self, adapters: Iterable[tuple[Any, Any]]) -> Self:
        """Fixes the entries if no step has, and stores them as values and indices. Returns the config with `phase` `fixed`."""
        for tower in by_tower(adapters):
            if not is_fixed(tower):
                fix_largest(tower, self._count(tower))
            store_entries(tower, self._count(tower))
        return dataclasses.replace(self, phase="fixed")

    def count(self, site: WeightSite | ParamSite) -> int:
        """2 · entries + groups; none in `fixed`, whose values belong to all sites together."""
        if self.phase == "fixed":
            return 0
        groups = self._group_shape(shape_of(site))
        return 2 * size_of(site) + (0 if groups is None else math.prod(groups))

    def summary(self, adapters: Iterable[tuple[Any, Adapter]]) -> str:
        """The number of entries that remain, or shall remain."""
        parts = list(adapters)
        towers = by_tower(parts)
        if not towers:
            return describe(adapter for _, adapter in parts)
        total = sum(adapter.kept.numel() for tower in towers for adapter in tower)
        if any(is_fixed(tower) for tower in towers):
            kept = sum(int(adapter.kept.sum()) for tower in towers for adapter in tower)
            return f"{kept:,} of {total:,} entries selected"
        return f"{sum(self._count(tower) for tower in towers):,} of {total:,} entries to be selected"

    @classmethod
    def examples(cls) -> tuple[DiffPruning, DiffPruning]:
        """With gates that no sample closes, so that two steps train every update."""
        return cls(initial_logit=10.0), cls(initial_logit=10.0, gate_groups="row")


def shape_of(site: WeightSite | ParamSite) -> tuple[int, ...]:
    """Shape of the tensor of a site."""
    return site.weight_shape if isinstance(site, WeightSite) else site.shape
