"""Runs of the rows of a comparison on one dataset, with its files after each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import TransferConfig
from ..data.run_data import Data, Views
from ..data.unlabeled import read_unlabeled
from ..models.loading import open_classifier
from ..report.comparison_files import write_comparison
from ..train.comparison import Comparison, RunMetrics
from ..train.method_rows import MethodRow
from .base_to_new import NewClasses


@dataclass(frozen=True)
class SearchData:
    """The data of a search.

    Args:
        data: its splits may differ from those of the training.
        folder, seed: of a search that several datasets share, whose runs are then timed in one round only; None for a search in
            the folder of the results, with their seed.
    """

    data: Data
    folder: Path | None = None
    seed: int | None = None


def run_rows(
    base: TransferConfig, rows: Sequence[MethodRow], seeds: Iterable[int], data: Data, out: Path, accelerator: Accelerator, *,
    record: Mapping[str, Any], search: SearchData, on_run: Callable[[RunMetrics], None], new: Data | None = None,
) -> list[RunMetrics]:  # fmt: skip
    """Runs the rows with all seeds, and writes the files of the comparison after each run, its plot after the last.

    Args:
        base: options that all rows share. `record`: the options as they are saved. `on_run`: called after each run.
        new: images of new classes, for a test.
    """
    measured = list[RunMetrics]()
    out.mkdir(parents=True, exist_ok=True)
    classifier = open_classifier(base.model, data.classes, weights=base.weights, size=base.size, seed=base.seed)
    unlabeled = None if base.unlabeled is None else read_unlabeled(base.unlabeled, data.source.mirror)
    with ExitStack() as stack:
        views, search_views = (
            stack.enter_context(
                Views(each, classifier.data, base.augment, squash=base.squash, workers=base.workers, unlabeled=unlabeled)
            )
            for each in (data, search.data)
        )
        shared_views = None if search.data is data else search_views
        comparison = Comparison(base, views, classifier, out, accelerator, shared_views)
        comparison.search_folder = search.folder or comparison.search_folder
        if search.seed is not None:
            comparison.search_seed = search.seed
            comparison.cost_rounds = 1
        comparison.new_classes = None if new is None else NewClasses(new, base, accelerator)
        runs = [(row, seed) for seed in seeds for row in rows]
        for row, seed in runs:
            measured.append(comparison.run(row, seed))
            write_comparison(record, comparison, out, plot=len(measured) == len(runs))
            on_run(measured[-1])
    return measured
