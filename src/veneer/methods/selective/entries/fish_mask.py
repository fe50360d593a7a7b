"""FISH mask: trains the entries of the weights with the largest Fisher information."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, WeightSite

from ._entries import Entries, SparseAdapter, count_entries, describe, size_of
from ._scores import accumulate_gradients, select_highest

Score = Literal["square", "absolute"]


@dataclass(frozen=True)
class FishMask(Method):
    """W' = W + ΔW, where ΔW is nonzero at the `keep_ratio` of entries with the largest Fisher information F = Σ_n (dL_n/dW)².

    The entries are selected once before training, from the losses of single samples with their true labels (for diffusion over
    timesteps and noise), among all selected weights of a tower together. Only their values have a gradient and optimizer state,
    initialized to zero; a file has values and indices. With a head of random weights, gradients mean little: `--lp-ft` solves
    the head first.

    Args:
        keep_ratio: part of the entries that is trained, above 0, at most 1.
        samples: samples for the scores, at least 1.
        score: `square` for F, `absolute` for Σ_n |dL_n/dW|.
    Counts: floor(keep_ratio · entries), at least 1; ViT-B/16's block linears 424,673, with `where="*"` 428,993.
    Source: Sung, Nair, Raffel, Training Neural Networks with Fixed Sparse Masks, NeurIPS 2021, section 3, with the empirical
    Fisher information (its `label` scores, and 256 samples, as on CIFAR-10). Deviations: the scores are computed in the mode of
    the model in training; a head is trained beside, and not charged to `keep_ratio`; by default biases, norms and embeddings
    are not among the entries; each tower of a pipeline has its own share.
    """

    name: ClassVar[str] = "fish_mask"
    uses: ClassVar[tuple[str, ...]] = ("classification", "smallest_file")
    paper: ClassVar[str] = "Sung, Nair, Raffel, Training Neural Networks with Fixed Sparse Masks, NeurIPS 2021"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite), Need(ParamSite))
    default: ClassVar[tuple[str, ...]] = ("attn", "xattn", "mlp")
    learning_rate: ClassVar[float] = 1e-3
    selects: ClassVar[bool] = True
    shared_options: ClassVar[tuple[str, ...]] = ("keep_ratio", "samples", "score")

    keep_ratio: float = 0.005
    samples: int = 256
    score: Score = "square"

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise OptionError.of(self.name, "keep_ratio", self.keep_ratio, "above 0 and at most 1")
        if self.samples < 1:
            raise OptionError.of(self.name, "samples", self.samples, "at least 1")
        if self.score not in get_args(Score):
            raise OptionError.of(self.name, "score", self.score, f"one of {', '.join(get_args(Score))}")

    def build_shared(self, sites: Sequence[WeightSite | ParamSite]) -> Entries:
        """The entries of all sites of a tower."""
        sizes = [size_of(site) for site in sites]
        return Entries(sizes, count_entries(sizes, self.keep_ratio), [site.name for site in sites])

    def build(self, site: WeightSite | ParamSite) -> SparseAdapter:
        """The adapter of one weight; its parameters are in the shared entries."""
        return SparseAdapter(site.name)

    def select(self, adapters: Sequence[tuple[Any, Adapter]], losses: Iterable[Tensor]) -> None:
        """Selects the entries with the highest scores."""
        term = torch.square if self.score == "square" else torch.abs
        parts = [(site, adapter) for site, adapter in adapters if isinstance(adapter, SparseAdapter)]
        select_highest(parts, accumulate_gradients(self.name, parts, losses, self.samples, term))

    def count(self, site: WeightSite | ParamSite) -> int:
        """None: the values belong to all sites together."""
        return 0

    def summary(self, adapters: Iterable[tuple[Any, Adapter]]) -> str:
        """The number of selected entries."""
        return describe(adapter for _, adapter in adapters)

    @classmethod
    def examples(cls) -> tuple[FishMask, FishMask]:
        """With enough entries for the layers of small models."""
        return cls(keep_ratio=0.4), cls(keep_ratio=0.3, score="absolute")
