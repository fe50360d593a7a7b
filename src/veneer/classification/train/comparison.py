"""Training runs of several methods on the same images, splits, budget and schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from veneer.formats import native
from veneer.training.loop.config import IF_SET
from veneer.training.report.memory_profile import peak
from veneer.training.report.progress import ProgressLine

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.cached_features import CachedFeatures
from ..models.classifier import Classifier
from ..models.loading import new_head, open_classifier
from .attach_methods import adapters_disabled, attach_methods
from .hyperparameter_search import ALGORITHM, read_search, search_hyperparameters
from .method_rows import MethodRow as MethodRow
from .method_rows import parse_rows as parse_rows
from .train import ClassifierTrainer


@dataclass(frozen=True)
class RunMetrics:
    """Metrics of a run of one row with one seed.

    Args:
        row, seed: label of the row, and the seed. `key`: hash of everything that the metrics depend on.
        test_accuracy, val_accuracy: `Metrics.score`. `chosen_epoch`, `learning_rate`: of the run.
        trainable_parameters, stored_bytes: number of trainable parameters, and size of the adapter file.
        step_over_floor: CPU time of a training step relative to a forward pass of the frozen model on the same images.
        peak_memory_bytes: of a training step, beyond the memory held between steps.
        cached: whether the features were computed once per image. `seconds`: of training.
        new_accuracy: test accuracy on new classes, if they are tested.
    """

    row: str
    seed: int
    key: str
    test_accuracy: float
    val_accuracy: float
    chosen_epoch: int
    learning_rate: float
    trainable_parameters: int
    stored_bytes: int
    step_over_floor: float
    peak_memory_bytes: int
    cached: bool
    seconds: float
    new_accuracy: float | None = None

    def summary(self, metric: str) -> str:
        """The row with its scores, for a line of text. `metric`: name of the score."""
        scores = f"test {metric} {self.test_accuracy:.1%}, validation {metric} {self.val_accuracy:.1%}"
        scores += "" if self.new_accuracy is None else f", new classes {self.new_accuracy:.1%}"
        return f"{self.row}, seed {self.seed}: {scores}"


DEFAULTS: Mapping[str, Any] = {
    **IF_SET, "block_lr": {}, "layer_decay": 1.0, "head_learning_rate": None, "multi_label": False, "init_from": None,
    "keep_epoch": "best", "with_": (), "unlabeled": None, "more_data": (), "tasks": False,
    "task_temperature": 10.0, "method_where": {},
}  # fmt: skip
"""Options that are part of the hash of a run only if they differ from these."""


class NewClassTest(Protocol):
    """Test on classes that the methods were not trained on."""

    def accuracy(self, adapter: Path | None) -> float:
        """Test accuracy with an adapter file, or without one."""
        ...


class Comparison:
    """Runs the rows of a comparison, which share one model, one feature cache and one file of results.

    Args:
        base: options that all rows share. `views`: of the images. `out`: folder for results; runs that are in `out/results.json`
            are not repeated. `search_views`: of the images of the search, if its splits differ from those of the training.

    Attributes:
        search_folder, search_seed: where trials are saved, and the seed of everything random in the search. Several comparisons
            with the same images of the search may share them, and then train its trials once.
        cost_rounds: timed rounds of `step_cost`.
        new_classes: tests each run on new classes; None for none.
    """

    def __init__(
        self, base: TransferConfig, views: Views, classifier: Classifier, out: Path, accelerator: Accelerator,
        search_views: Views | None = None,
    ) -> None:  # fmt: skip
        self.base, self.views, self.out, self.accelerator = base, views, out, accelerator
        self.classifier, self.search_views = classifier, search_views or views
        self.features = CachedFeatures(classifier, views, base.batch)
        self.search_features = self.features
        if self.search_views is not views:
            self.search_features = CachedFeatures(classifier, self.search_views, base.batch)
        self.search_folder, self.search_seed, self.cost_rounds = out / "search", base.seed, 5
        self.new_classes: NewClassTest | None = None
        self.done = self._read()

    def _read(self) -> list[RunMetrics]:
        file = self.out / "results.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"runs": []}
        return [RunMetrics(**run) for run in (*record["runs"], *record.get("other_runs", ()))]

    @property
    def current(self) -> list[RunMetrics]:
        """The runs in `done` with the options of this comparison; the others are of earlier ones in the same folder."""
        return [run for run in self.done if self.key(parse_rows(run.row)[0], run.seed) == run.key]

    def config(self, row: MethodRow, seed: int) -> TransferConfig:
        """Config of a run."""
        weights = "none" if row.scratch else self.base.weights
        options = {k: {**self.base.options.get(k, {}), **v} for k, v in row.options.items()}
        base = dataclasses.replace(self.base, where=row.where or self.base.selection(), target_modules=())
        return dataclasses.replace(base, method=row.method, options=options, weights=weights, seed=seed)

    def key(self, row: MethodRow, seed: int) -> str:
        """Hash of everything that the metrics of a run depend on."""
        config = self.config(row, seed)
        known = {**config.identity(), **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}}
        for name in ("data", "weights", "resume", "dry_run", "out", "workers", "tracker", "cache"):
            known.pop(name)
        known = {name: value for name, value in known.items() if name not in DEFAULTS or value != DEFAULTS[name]}
        known |= {"search_algorithm": ALGORITHM, "search_seed": self.search_seed} if config.search else {}
        if config.search and self.search_folder.parent != self.out:
            known["search_splits"] = self.search_views.data.splits.digest
        known |= {"splits": self.views.data.splits.digest, "base": self.classifier.weights, "scratch": row.scratch}
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def run(self, row: MethodRow, seed: int) -> RunMetrics:
        """Metrics of a run, from the results file or from training it."""
        key = self.key(row, seed)
        known = next((m for m in self.done if m.key == key), None)
        if known is not None:
            return known
        config, folder = self._search(row, seed), self.out / "runs" / f"{_file_name(row.label)}-{seed}"
        classifier = self._model(row, seed)
        self.views.reseed(seed)
        attached = attach_methods(classifier, config, self.views.data)
        try:
            features = None if row.scratch else self.features
            identity = {"key": key}
            trainer = ClassifierTrainer(
                classifier, attached, self.views, config, folder, self.accelerator, identity, ProgressLine(), features
            )
            result = trainer.train()
            if result.best is None or result.validation is None:
                raise KeyboardInterrupt
            file = native.save(attached, folder / "adapter.safetensors") if attached else None
            stored = file.stat().st_size if file is not None else 0
            new = None if self.new_classes is None else self.new_classes.accuracy(file)
            ratio, memory = step_cost(trainer, self.cost_rounds)
            measured = RunMetrics(
                row.label, seed, key, trainer.metrics("test").score, result.validation.score, result.best.epoch,
                config.rate(), result.trainable, stored, ratio, memory, result.cached, result.loop.seconds, new,
            )  # fmt: skip
        finally:
            for attachment in reversed(attached):
                attachment.detach()
        self.done.append(measured)
        shutil.rmtree(folder, ignore_errors=True)
        return measured

    def _model(self, row: MethodRow, seed: int) -> Classifier:
        """The shared model with a new head, or a new model from random weights for `scratch`."""
        names, entry = self.views.data.classes, self.base
        if not row.scratch:
            if self.classifier.fresh:
                with torch.random.fork_rng(devices=[]):
                    new_head(self.classifier.model, self.classifier.name, len(names), seed)
            return self.classifier
        return open_classifier(entry.model, names, weights="none", size=entry.size, seed=seed)

    def _search(self, row: MethodRow, seed: int) -> TransferConfig:
        """The run's config, with the learning rate and scale that the search chose for the row.

        Everything random in the search is of its own seed, whichever run needs its choice first.
        """
        config = dataclasses.replace(self.config(row, seed), resume=True)
        if not config.search:
            return config
        folder = self._search_folder(row.label)
        folder.mkdir(parents=True, exist_ok=True)
        first = dataclasses.replace(config, seed=self.search_seed, shots=self.search_views.data.splits.shots)
        classifier = self._model(row, self.search_seed)
        self.search_views.reseed(self.search_seed)
        features = None if row.scratch else self.search_features
        best = search_hyperparameters(first, classifier, self.search_views, folder, self.accelerator, features)
        return dataclasses.replace(config, learning_rate=best.learning_rate, options=best.options)

    def searches(self) -> dict[str, list[dict[str, Any]]]:
        """Row to the trials of its search, of the rows that have one."""
        trials = {row: read_search(self._search_folder(row)) for row in dict.fromkeys(m.row for m in self.current)}
        return {row: of_row for row, of_row in trials.items() if of_row}

    def _search_folder(self, label: str) -> Path:
        return self.search_folder / _file_name(label)


def step_cost(trainer: ClassifierTrainer, rounds: int = 5) -> tuple[float, int]:
    """CPU time of a training step relative to a frozen forward pass (median of interleaved rounds), and peak bytes of a step."""
    parameters = [p for a in trainer.attached for p in a.parameters()]
    if not parameters:
        return 0.0, 0
    loss, rows = trainer.loss(), list(range(trainer.config.batch))
    loss.prefetch = None
    pixels, _ = next(iter(trainer.views.batches("train", trainer.config.batch)))
    pixels = pixels.to(trainer.accelerator.device)
    fixed = loss.inputs([loss.order.at(row) for row in rows])
    loss.inputs = lambda samples: fixed
    device, dtype = pixels.device.type, trainer.dtype

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            value = loss(0, rows)
        value.backward()
        for p in parameters:
            p.grad = None

    def frozen_forward() -> None:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None), adapters_disabled(trainer.attached):
            trainer.model(pixels)

    step()
    frozen_forward()
    memory = peak(step)
    return statistics.median(_cpu_time(step) / _cpu_time(frozen_forward) for _ in range(rounds)), memory


def _cpu_time(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _file_name(label: str) -> str:
    return re.sub(r"[^\w+]+", "_", label).strip("_")


def by_row(runs: Sequence[RunMetrics], row: str) -> list[RunMetrics]:
    """Runs of a row, sorted by seed."""
    return sorted((m for m in runs if m.row == row), key=lambda m: m.seed)
