"""Search for learning rate and scale by successive halving on the validation split."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from veneer.atomic_files import write_json
from veneer.injection import VeneerError
from veneer.training.loop.divergence import Diverged

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.cached_features import CachedFeatures, reads_features_only
from ..models.classifier import Classifier
from .attach_methods import attach_methods
from .successive_halving import Score, best, rank, round_sizes, round_steps
from .train import ClassifierTrainer

_log = logging.getLogger(__name__)

FILE = "search.json"
ALGORITHM = "successive halving"
RATES = (1.0, 3.0, 0.3, 10.0, 0.1, 30.0, 0.03)
"""Learning rates relative to the config's, in the order in which a search adds them: a grid of three decades, two rates each."""
SCALES = ("scale", "alpha", "beta")
FACTORS = (1.0, 10.0, 0.1)
NOT_HASHED = (
    "data", "model", "weights", "out", "resume", "dry_run", "workers", "tracker", "search", "search_epochs", "epochs", "steps",
    "patience", "learning_rate", "options",
)  # fmt: skip
"""Options that trials do not depend on, or that a trial records itself."""


def candidates(config: TransferConfig, rates: Sequence[float] = RATES) -> list[TransferConfig]:
    """The first `search` candidates: learning rates around the config's, then the same rates at other scales of the method."""
    return [
        dataclasses.replace(config, learning_rate=config.rate() * rate, options=options, search=0)
        for options in _scaled_options(config)
        for rate in rates
    ][: config.search]


def _scaled_options(config: TransferConfig) -> Iterator[dict[str, Any]]:
    """Options with the first method's scale, or α and β, multiplied by each combination of `FACTORS`."""
    first = next(iter(config.build_methods()), None)
    named = {n: v for n in SCALES if isinstance(v := getattr(first, n, None), float)}
    for factors in itertools.product(FACTORS, repeat=len(named)):
        scaled = {n: v * f for (n, v), f in zip(named.items(), factors, strict=True) if f != 1}
        changed = {first.name: {**config.options.get(first.name, {}), **scaled}} if first and scaled else {}
        yield {**config.options, **changed}


def search_hyperparameters(
    config: TransferConfig,
    classifier: Classifier,
    views: Views,
    out: Path,
    accelerator: Accelerator,
    features: CachedFeatures | None = None,
) -> TransferConfig:
    """The config with the learning rate and scale that win a successive halving. Trials are saved in `out/search.json`.

    The budget of all trials is `search` times `search_epochs` passes over the training images. Only the training and validation
    splits are used, and only the config's seed. A resumed search reuses the finished trials of the same options, splits and
    model. With cached features trials are cheap, so that at least all `RATES` are candidates. A dry run has no search.
    """
    if not config.search or config.dry_run:
        return config
    if accelerator.num_processes > 1:
        message = "--search needs a single process. Search in one process, then pass --learning-rate to the distributed run."
        raise VeneerError(message, where="processes", given=accelerator.num_processes, expected=1)
    search = _Search(config, classifier, views, out, accelerator, features)
    remaining, chosen = search.candidates, search.candidates[0]
    for number, (size, steps) in enumerate(search.rounds, 1):
        entrants = remaining[:size]
        scores = [search.score(number, steps, candidate) for candidate in entrants]
        order = rank(scores, len(views.data.splits.validation))
        remaining, chosen = [entrants[i] for i in order], entrants[best(scores)]
        summary = _summary(entrants, scores, order)
        _log.info("search, round %d of %d, %d steps each: %s", number, len(search.rounds), steps, summary)
    shutil.rmtree(search.folder, ignore_errors=True)
    _log.info("search: chose %s", _label(chosen))
    return dataclasses.replace(chosen, search=config.search)


def read_search(out: Path) -> list[dict[str, Any]]:
    """The trials of a search in the order of training, from `out/search.json`; empty without a search.

    A trial has `round`, `steps`, `learning_rate`, `options`, `val_accuracy` and `val_loss`; both metrics are None if it diverged.
    `settings` is a hash of the other options, the splits and the model.
    """
    file = out / FILE
    trials = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return list(trials) if all("round" in trial for trial in trials) else []


class _Search:
    """The candidates of a search, its rounds of (candidates, steps), and its trials."""

    def __init__(
        self,
        config: TransferConfig,
        classifier: Classifier,
        views: Views,
        out: Path,
        accelerator: Accelerator,
        features: CachedFeatures | None,
    ) -> None:
        self.config, self.classifier, self.views = config, classifier, views
        self.accelerator, self.features = accelerator, features
        self.file, self.folder = out / FILE, out / "search"
        self.settings = _settings_hash(config, classifier, views)
        trained, cheap = self._costs()
        count = max(config.search, len(RATES)) if cheap else config.search
        self.candidates = candidates(dataclasses.replace(config, search=count), RATES if trained else (1.0,))
        per_epoch = max(1, len(views.data.splits.train) // (config.batch * config.gradient_accumulation_steps))
        budget = len(self.candidates) * config.search_epochs * per_epoch
        sizes, steps = round_sizes(len(self.candidates)), round_steps(len(self.candidates), budget)
        self.rounds = list(zip(sizes, steps, strict=True)) if trained else [(len(self.candidates), 1)]
        self._known = iter(read_search(out) if config.resume else [])
        self.trials: list[dict[str, Any]] = []

    def score(self, number: int, steps: int, candidate: TransferConfig) -> Score:
        """Validation metrics of a candidate after `steps` steps: of the finished trial, or from a new one."""
        trial = _json({"round": number, "steps": steps, "learning_rate": candidate.rate(), "options": candidate.options})
        trial["settings"] = self.settings
        known = next(self._known, None)
        if known is not None and {name: known.get(name) for name in trial} == trial:
            self.trials.append(known)
        else:
            self._known = iter(())
            accuracy, loss = self._train(candidate, steps)
            self.trials.append({**trial, "val_accuracy": accuracy, "val_loss": loss})
            write_json(self.file, self.trials)
        accuracy, loss = self.trials[-1]["val_accuracy"], self.trials[-1]["val_loss"]
        return Score(0.0, math.inf, candidate.rate()) if loss is None else Score(accuracy, loss, candidate.rate())

    def _train(self, candidate: TransferConfig, steps: int) -> tuple[float | None, float | None]:
        """Validation accuracy and loss of a run of `steps` steps with its complete schedule; None if it diverges."""
        shutil.rmtree(self.folder, ignore_errors=True)
        short = dataclasses.replace(candidate, steps=steps, patience=0, resume=False)
        attached = attach_methods(self.classifier, short, self.views.data)
        try:
            trainer = ClassifierTrainer(
                self.classifier, attached, self.views, short, self.folder, self.accelerator, features=self.features
            )
            epoch = trainer.train().best
        except Diverged:
            return None, None
        finally:
            for attachment in reversed(attached):
                attachment.detach()
        if epoch is None:
            raise KeyboardInterrupt
        return (epoch.val_accuracy, epoch.val_loss) if math.isfinite(epoch.val_loss) else (None, None)

    def _costs(self) -> tuple[bool, bool]:
        """Whether parameters are trained, and whether features are cached."""
        attached = attach_methods(self.classifier, self.config, self.views.data)
        try:
            trained = any(True for a in attached for _ in a.parameters())
            images_once = self.config.cache and not self.config.mixup and not self.config.cutmix
            return trained, images_once and reads_features_only(self.classifier, attached)
        finally:
            for attachment in reversed(attached):
                attachment.detach()


def _settings_hash(config: TransferConfig, classifier: Classifier, views: Views) -> str:
    """Hash of what the metrics of a trial depend on besides its own learning rate, options of methods and steps."""
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in NOT_HASHED}
    known = {**options, "splits": views.data.splits.digest, "weights": [classifier.name, classifier.weights]}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _json(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial as it is read from its file."""
    return dict(json.loads(json.dumps(trial, default=str)))


def _summary(entrants: Sequence[TransferConfig], scores: Sequence[Score], order: Sequence[int]) -> str:
    """The candidates of a round, best first, with their validation accuracies."""
    shown = ("diverged" if math.isinf(scores[i].loss) else f"{100 * scores[i].accuracy:.1f} %" for i in order)
    return "; ".join(f"{_label(entrants[i])}: {text}" for i, text in zip(order, shown, strict=True))


def _label(candidate: TransferConfig) -> str:
    options = (f"{method}.{name} {value}" for method, values in candidate.options.items() for name, value in values.items())
    return ", ".join([f"learning rate {candidate.rate():g}", *options])
