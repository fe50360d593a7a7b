"""Runs of several methods on the same pictures, splits, budget and schedule."""

from __future__ import annotations

import ast
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
from typing import Any, get_args, get_type_hints

import torch
from accelerate import Accelerator

from veneer.formats import native
from veneer.injection import methods
from veneer.injection.errors import OptionError
from veneer.training.report.memory_profile import peak
from veneer.training.report.progress import ProgressLine

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.cached_features import Features
from ..models.classifier import Classifier
from ..models.loading import new_head, open_classifier
from .hyperparameter_search import searched
from .train import Teacher, attach_methods, switched_off

ROW = re.compile(r"\s*([\w+]+)\s*(?:\(([^()]*)\))?\s*")
TYPES = {bool: "True or False", int: "a whole number", float: "a number"}
"""Types that an option's value must have, and their words."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        label: as it was written. `method`, `where`: for `TransferConfig`. `options`: of its (first) method. `scratch`: begin with
            random weights.
    """

    label: str
    method: str
    options: dict[str, dict[str, Any]]
    where: tuple[str, ...] | None = None
    scratch: bool = False


def rows_of(written: str) -> list[Row]:
    """Rows from `lora, adaptformer(bottleneck=8, scale=0.5), lora(rank=4, where=attn mlp), vpt+lora, scratch`.

    Raises:
        VeneerError: it cannot be read, or a row is there twice. UnknownName: no such method. TypeError: no such option.
    """
    found: list[Row] = []
    rest = written
    while rest.strip():
        match = ROW.match(rest)
        if match is None or (rest[match.end() :] and rest[match.end()] != ","):
            message = f"methods: cannot read {rest!r}; expected such as 'lora, adaptformer(bottleneck=8), vpt+lora, full'."
            raise OptionError(message, option="methods", given=rest)
        found.append(_row(match[0].strip(), match[1], match[2] or ""))
        rest = rest[match.end() + 1 :]
    labels = [row.label for row in found]
    if len(set(labels)) != len(labels) or not labels:
        message = f"methods: {written!r}; expected different methods, separated by commas."
        raise OptionError(message, option="methods", given=tuple(labels))
    return found


def _row(label: str, name: str, options: str) -> Row:
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in options.split(","))):
        key, sign, value = part.partition("=")
        if not sign:
            raise OptionError(f"methods: {label!r}: {part!r} is not key=value.", option="methods", where=label, given=part)
        try:
            given[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            given[key.strip()] = value.strip()
    where = given.pop("where", None)
    scratch = name == "scratch"
    method = "full" if scratch else name
    first = method.split("+")[0]
    if method != "zero_shot":
        for each in method.split("+"):
            methods.get(each)
        _check_types(methods.get(first), given, label)
        methods.get(first).from_config(given)
    return Row(label, method, {first: given} if given else {}, tuple(where.split()) if where else None, scratch)


def _check_types(method: type, given: Mapping[str, Any], label: str) -> None:
    """Reject a value of another type where the option is a number or a switch."""
    hints = get_type_hints(method)
    for name, value in given.items():
        kinds = get_args(hints.get(name)) or (hints.get(name),)
        expected = [words for kind, words in TYPES.items() if kind in kinds]
        fits = type(value) in kinds or (float in kinds and type(value) is int) or (value is None and type(None) in kinds)
        if expected and not fits and str not in kinds:
            message = f"methods: {label!r}: {name} is {value!r}; expected {' or '.join(expected)}."
            raise OptionError(message, option=name, where=label, given=value)


@dataclass(frozen=True)
class Measured:
    """A run of one row with one seed.

    Args:
        row, seed: which. `key`: of everything that its figures depend on.
        test_accuracy, val_accuracy, chosen_epoch, learning_rate: of the run.
        trainable_parameters, stored_bytes: what was trained and what is stored.
        step_over_floor: processor time of a training step over a pass of the frozen model on the same pictures.
        peak_memory_bytes: of a training step, above what is held between steps.
        cached: the backbone ran once for each picture. `seconds`: of training.
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


class Comparison:
    """The runs, with what they share: one model, one set of features, one file of results.

    Args:
        base: options that all rows share. `views`: of the pictures. `out`: for results; what is in `out/results.json` is not run
            again.
    """

    def __init__(self, base: TransferConfig, views: Views, classifier: Classifier, out: Path, accelerator: Accelerator) -> None:
        self.base, self.views, self.out, self.accelerator = base, views, out, accelerator
        self.classifier = classifier
        self.features = Features(classifier, views, base.batch)
        self._random: Classifier | None = None
        self.done = self._read()

    def _read(self) -> list[Measured]:
        file = self.out / "results.json"
        return [Measured(**run) for run in json.loads(file.read_text(encoding="utf-8"))["runs"]] if file.is_file() else []

    def config(self, row: Row, seed: int) -> TransferConfig:
        """The options of a run."""
        weights = "none" if row.scratch else self.base.weights
        options = {k: {**self.base.options.get(k, {}), **v} for k, v in row.options.items()}
        where = row.where or self.base.where
        return dataclasses.replace(self.base, method=row.method, options=options, where=where, weights=weights, seed=seed)

    def key(self, row: Row, seed: int) -> str:
        """A digest of what the figures of a run depend on."""
        config = self.config(row, seed)
        known = {**config.identity(), **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}}
        for name in ("data", "weights", "resume", "dry_run", "out", "workers", "tracker", "cache"):
            known.pop(name)
        known |= {"splits": self.views.data.splits.digest, "base": self.classifier.weights, "scratch": row.scratch}
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def run(self, row: Row, seed: int) -> Measured:
        """The figures of a run: those that are there, or new ones."""
        key = self.key(row, seed)
        known = next((m for m in self.done if m.key == key), None)
        if known is not None:
            return known
        classifier = self._model(row, seed)
        self.views.reseed(seed)
        config, folder = self._searched(row, seed, classifier), self.out / "runs" / f"{_plain(row.label)}-{seed}"
        attached = attach_methods(classifier, config, self.views.data)
        try:
            features = None if row.scratch else self.features
            identity = {"key": key}
            teacher = Teacher(
                classifier, attached, self.views, config, folder, self.accelerator, identity, ProgressLine(), features
            )
            taught = teacher.teach()
            if taught.best is None or taught.validation is None:
                raise KeyboardInterrupt
            stored = native.save(attached, folder / "adapter.safetensors").stat().st_size if attached else 0
            ratio, memory = step_cost(teacher)
            measured = Measured(
                row.label, seed, key, teacher.figures("test").accuracy, taught.validation.accuracy, taught.best.epoch,
                config.rate(), taught.trainable, stored, ratio, memory, taught.cached, taught.result.seconds,
            )  # fmt: skip
        finally:
            for attachment in reversed(attached):
                attachment.detach()
        self.done.append(measured)
        shutil.rmtree(folder, ignore_errors=True)
        return measured

    def _model(self, row: Row, seed: int) -> Classifier:
        """The shared model with a new head; from random weights a model of its own."""
        names, entry = self.views.data.classes, self.base
        if not row.scratch:
            if self.classifier.fresh:
                with torch.random.fork_rng(devices=[]):
                    new_head(self.classifier.model, self.classifier.name, len(names), seed)
            return self.classifier
        return open_classifier(entry.model, names, weights="none", size=entry.size, seed=seed)

    def _searched(self, row: Row, seed: int, classifier: Classifier) -> TransferConfig:
        """The run's config, with the rate and scale that the first seed found for the row."""
        config = dataclasses.replace(self.config(row, seed), resume=True)
        if not config.search:
            return config
        folder = self.out / "search" / _plain(row.label)
        folder.mkdir(parents=True, exist_ok=True)
        first = dataclasses.replace(config, seed=self.base.seed)
        features = None if row.scratch else self.features
        found = searched(first, classifier, self.views, folder, self.accelerator, features)
        return dataclasses.replace(config, learning_rate=found.learning_rate, options=found.options)


def step_cost(teacher: Teacher, rounds: int = 5) -> tuple[float, int]:
    """(processor time of a training step over that of a frozen pass, median of rounds by turns; peak bytes of a step)."""
    parameters = [p for a in teacher.attached for p in a.parameters()]
    if not parameters:
        return 0.0, 0
    loss, rows = teacher.loss(), list(range(teacher.config.batch))
    loss.expect = None
    pixels, _ = next(iter(teacher.views.batches("train", teacher.config.batch)))
    pixels = pixels.to(teacher.accelerator.device)
    fixed = loss.inputs([loss.order.at(row) for row in rows])
    loss.inputs = lambda drawn: fixed
    device, dtype = pixels.device.type, teacher.dtype

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            value = loss(0, rows)
        value.backward()
        for p in parameters:
            p.grad = None

    def floor() -> None:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None), switched_off(teacher.attached):
            teacher.model(pixels)

    step()
    floor()
    memory = peak(step)
    return statistics.median(_timed(step) / _timed(floor) for _ in range(rounds)), memory


def _timed(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _plain(label: str) -> str:
    return re.sub(r"[^\w+]+", "_", label).strip("_")


def by_row(runs: Sequence[Measured], row: str) -> list[Measured]:
    """The runs of a row, in order of their seeds."""
    return sorted((m for m in runs if m.row == row), key=lambda m: m.seed)
