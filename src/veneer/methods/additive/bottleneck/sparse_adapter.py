"""SparseAdapter: bottlenecks whose matrices are pruned at initialization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import BranchSite
from veneer.methods.selective.entries._entries import Entries, count_entries
from veneer.methods.selective.entries._scores import accumulate_gradients, select_highest

from ._bottleneck import check_bottleneck_options
from ._pruned_bottleneck import (
    MATRICES,
    PrunedBottleneck,
    PrunedMatrix,
    erdos_renyi_counts,
    largest_of_each,
    matrix_shapes,
    synflow_scores,
    uniform_counts,
)

Score = Literal["snip", "magnitude", "synflow", "random", "erdos_renyi"]
Scope = Literal["global", "local"]


@dataclass(frozen=True)
class SparseBottleneck(Method):
    """y' = y + (M_u ∘ U) ReLU((M_d ∘ D) y + b_d) + b_u: y the attention or MLP branch, M_u and M_d masks fixed before training.

    The masks keep the `keep_ratio` of entries of D and U with the highest scores at initialization. Only the kept entries are
    parameters: a file has their values and indices. The large and sparse form of the paper has a wide bottleneck and a low
    keep_ratio: 256 and 0.05 have the entries of 64 and 0.2.

    Args:
        bottleneck: h, width between Down and Up, at least 1.
        keep_ratio: part of the entries of D and U that is kept, above 0, at most 1.
        score: `snip` for |θ ∘ Σ_n dL_n/dθ|, `magnitude` for |θ|, `synflow` for |θ ∘ dR/dθ| with R the mean output of a bottleneck
            with |θ|, without ReLU, for an input of ones; `random`; `erdos_renyi` for random entries, of a matrix (n, m) in
            proportion to n + m.
        scope: `global` compares the scores of all matrices of a tower, `local` keeps the same part of each. `erdos_renyi` has
            its own numbers.
        samples: training samples for `snip`, at least 1.
        std: standard deviation of the initial D and U, above 0, because SNIP's scores are zero if U is; biases are zero.
    Counts: floor(keep_ratio · 2·width·h · branches) + h + width per branch; ViT-B/16 471,859 + 19,968 = 491,827.
    Source: He, Ding, Dong, Zhang, Tao, SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters,
    Findings of EMNLP 2022, section 2, and the authors' code (`pruning/pruners.py`, whose `sparsity` is the kept part; normal
    with 0.02; one round of scores; biases are not pruned). Deviations: entries are kept by count in place of a threshold; no
    GraSP, which needs second derivatives of the host; no layer norm inside the adapter; other kinds of adapters are not pruned.
    """

    name: ClassVar[str] = "sparse_adapter"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "He, Ding, Dong, Zhang, Tao, SparseAdapter, Findings of EMNLP 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(BranchSite),)
    default: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    selects: ClassVar[bool] = True
    shared_options: ClassVar[tuple[str, ...]] = ("keep_ratio", "score", "scope", "samples", "bottleneck")

    bottleneck: int = 64
    keep_ratio: float = 0.2
    score: Score = "snip"
    scope: Scope = "global"
    samples: int = 256
    std: float = 0.02

    def __post_init__(self) -> None:
        check_bottleneck_options(self.name, self.bottleneck)
        checks = {
            "keep_ratio": (0 < self.keep_ratio <= 1, "above 0 and at most 1"),
            "score": (self.score in get_args(Score), f"one of {', '.join(get_args(Score))}"),
            "scope": (self.scope in get_args(Scope), f"one of {', '.join(get_args(Scope))}"),
            "samples": (self.samples >= 1, "at least 1"),
            "std": (self.std > 0, "above 0"),
        }
        OptionError.check(self, checks)

    def build_shared(self, sites: Sequence[BranchSite]) -> Entries:
        """The entries of all matrices of a tower."""
        sizes = [self.bottleneck * site.width for site in sites for _ in MATRICES]
        return Entries(
            sizes, count_entries(sizes, self.keep_ratio), [f"{site.name}.{side}" for site in sites for side in MATRICES]
        )

    def build(self, site: BranchSite) -> PrunedBottleneck:
        """The biases and the initial matrices of one branch; the parameters of its matrices are in the shared entries."""
        return PrunedBottleneck(site, self.bottleneck, self.std)

    def select(self, adapters: Sequence[tuple[Any, Adapter]], losses: Iterable[Tensor]) -> None:
        """Keeps the entries with the highest scores, with their initial values."""
        parts = [(site, adapter) for site, adapter in adapters if isinstance(adapter, PrunedBottleneck)]
        matrices = [matrix for _, adapter in parts for matrix in (adapter.down, adapter.up)]
        scores = self._scores(parts, matrices, losses)
        towers: dict[int, list[int]] = {}
        for i, matrix in enumerate(matrices):
            towers.setdefault(id(matrix.own), []).append(i)
        for numbers in towers.values():
            own = [matrices[i] for i in numbers]
            select_highest([(None, matrix) for matrix in own], self._marks(own, [scores[i] for i in numbers]))
        for _, adapter in parts:
            adapter.copy_initial()
            adapter.drop_initial()

    def _scores(
        self, parts: Sequence[tuple[Any, PrunedBottleneck]], matrices: Sequence[PrunedMatrix], losses: Iterable[Tensor]
    ) -> list[Tensor]:
        """Scores of all entries, matrix by matrix."""
        if self.score == "snip":
            pairs = [(matrix, matrix) for matrix in matrices]
            sums = accumulate_gradients(self.name, pairs, losses, self.samples, lambda g: g)
            return [(total * matrix.initial).abs() for total, matrix in zip(sums, matrices, strict=True)]
        if self.score == "synflow":
            by_adapter = [synflow_scores(adapter.down.initial, adapter.up.initial) for _, adapter in parts]
            return [score for both in by_adapter for score in both]
        if self.score == "magnitude":
            return [matrix.initial.abs() for matrix in matrices]
        return [torch.rand_like(matrix.initial) for matrix in matrices]

    def _marks(self, matrices: Sequence[PrunedMatrix], scores: list[Tensor]) -> list[Tensor]:
        """The scores of one tower, or 1 at the highest of each matrix if their numbers are fixed."""
        total = len(matrices[0].own.values)
        if self.score == "erdos_renyi":
            return largest_of_each(scores, erdos_renyi_counts([matrix.shape for matrix in matrices], total))
        if self.scope == "local":
            return largest_of_each(scores, uniform_counts([score.numel() for score in scores], total))
        return scores

    def count(self, site: BranchSite) -> int:
        """h + width; the values belong to all sites together."""
        return sum(rows for rows, _ in matrix_shapes(site, self.bottleneck))

    def summary(self, adapters: Iterable[tuple[Any, Adapter]]) -> str:
        """The number of kept entries."""
        towers = {id(adapter.own): adapter.own for _, adapter in adapters if isinstance(adapter, PrunedBottleneck)}.values()
        count, total = sum(len(entries.values) for entries in towers), sum(entries.starts[-1] for entries in towers)
        state = "kept" if all(entries.is_selected for entries in towers) else "to be kept"
        return f"{count:,} of {total:,} entries {state}"

    @classmethod
    def examples(cls) -> tuple[SparseBottleneck, SparseBottleneck]:
        """With enough entries for small models."""
        return cls(bottleneck=16, keep_ratio=0.5), cls(bottleneck=16, keep_ratio=0.6, score="magnitude", scope="local")
