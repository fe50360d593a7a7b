"""Search for learning rate and scale on the validation split, within a given number of trials."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from veneer.atomic_files import write_json
from veneer.injection import VeneerError

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.cached_features import CachedFeatures, reads_features_only
from ..models.classifier import Classifier
from .attach_methods import attach_methods
from .train import ClassifierTrainer

_log = logging.getLogger(__name__)

RATES = (1.0, 3.0, 10.0, 0.3, 0.1)
SCALES = ("scale", "alpha", "beta")
FACTORS = (1.0, 10.0, 0.1)


def trials(config: TransferConfig, rates: Sequence[float] = RATES) -> list[TransferConfig]:
    """The first `search` trials: learning rates around the config's, then the same rates at other scales of the method."""
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
    """The config with the learning rate and scale of the best validation accuracy. Trials are saved in `search.json`.

    Each trial is a run of `search_epochs` with its complete learning rate schedule. A resumed search reuses the finished trials.
    With cached features trials are cheap, so that at least all `RATES` are candidates.
    """
    if not config.search:
        return config
    if accelerator.num_processes > 1:
        message = "--search needs a single process. Search in one process, then pass --learning-rate to the distributed run."
        raise VeneerError(message, where="processes", given=accelerator.num_processes, expected=1)
    file, folder = out / "search.json", out / "search"
    done = json.loads(file.read_text(encoding="utf-8")) if config.resume and file.is_file() else []
    candidates = _candidates(classifier, config, views)
    for number, trial in enumerate(candidates[len(done) :], len(done)):
        shutil.rmtree(folder, ignore_errors=True)
        short = dataclasses.replace(trial, epochs=config.search_epochs, steps=None, patience=0, resume=False)
        attached = attach_methods(classifier, short, views.data)
        try:
            result = ClassifierTrainer(classifier, attached, views, short, folder, accelerator, features=features).train()
        finally:
            for attachment in reversed(attached):
                attachment.detach()
        if result.best is None:
            raise KeyboardInterrupt
        accuracy, loss = result.best.val_accuracy, result.best.val_loss
        done.append({"learning_rate": trial.rate(), "options": trial.options, "val_accuracy": accuracy, "val_loss": loss})
        if accelerator.is_main_process:
            write_json(file, done)
            _log.info(
                "trial %d of %d: %s: validation accuracy %.1f %%", number + 1, len(candidates), _label(trial), 100 * accuracy
            )
    shutil.rmtree(folder, ignore_errors=True)
    best = min(range(len(done)), key=lambda i: (-done[i]["val_accuracy"], done[i]["val_loss"], i))
    return dataclasses.replace(candidates[best], search=config.search)


def _label(trial: TransferConfig) -> str:
    options = ", ".join(f"{method}.{name} {value}" for method, values in trial.options.items() for name, value in values.items())
    return f"learning rate {trial.rate():g}" + (f", {options}" if options else "")


def _candidates(classifier: Classifier, config: TransferConfig, views: Views) -> list[TransferConfig]:
    """The trials: no learning rates if nothing is trained, and all of them if features are cached."""
    attached = attach_methods(classifier, config, views.data)
    try:
        trained = any(True for a in attached for _ in a.parameters())
        cheap = config.cache and reads_features_only(classifier, attached)
    finally:
        for attachment in reversed(attached):
            attachment.detach()
    if not trained:
        return trials(config, (1.0,))
    return trials(dataclasses.replace(config, search=max(config.search, len(RATES))) if cheap else config)
