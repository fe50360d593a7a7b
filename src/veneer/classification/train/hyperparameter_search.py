"""A small search for learning rate and scale, on the validation pictures and within a stated number of trials."""

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

from veneer.injection import VeneerError
from veneer.training.loop.checkpoints import write_json

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.cached_features import Features, reads_features_only
from ..models.classifier import Classifier
from .train import Teacher, attach_methods

_log = logging.getLogger(__name__)

RATES = (1.0, 3.0, 10.0, 0.3, 0.1)
STRENGTHS = ("scale", "alpha", "beta")
FACTORS = (1.0, 10.0, 0.1)


def trials(config: TransferConfig, rates: Sequence[float] = RATES) -> list[TransferConfig]:
    """The first `search` of the trials: rates around the usual one, then the same at other strengths, if the method has some."""
    return [
        dataclasses.replace(config, learning_rate=config.rate() * rate, options=options, search=0)
        for options in _strengths(config)
        for rate in rates
    ][: config.search]


def _strengths(config: TransferConfig) -> Iterator[dict[str, Any]]:
    """The options with the first method's scale, or α and β, as they are, and multiplied."""
    first = next(iter(config.built()), None)
    named = {n: v for n in STRENGTHS if isinstance(v := getattr(first, n, None), float)}
    for factors in itertools.product(FACTORS, repeat=len(named)):
        own = {n: v * f for (n, v), f in zip(named.items(), factors, strict=True) if f != 1}
        told = {first.name: {**config.options.get(first.name, {}), **own}} if first and own else {}
        yield {**config.options, **told}


def searched(
    config: TransferConfig,
    classifier: Classifier,
    views: Views,
    out: Path,
    accelerator: Accelerator,
    features: Features | None = None,
) -> TransferConfig:
    """The config with the rate and scale that did best on the validation pictures. Trials are written down in `search.json`.

    Each trial is a short run of `search_epochs`, with its whole schedule. A resumed search takes the trials that are there. Where
    features are computed once a trial costs next to nothing, and all rates are tried.
    """
    if not config.search:
        return config
    if accelerator.num_processes > 1:
        message = "search runs in one process. Search there first, then give --learning-rate to several."
        raise VeneerError(message, where="processes", given=accelerator.num_processes, expected=1)
    file, folder = out / "search.json", out / "search"
    done = json.loads(file.read_text(encoding="utf-8")) if config.resume and file.is_file() else []
    tried = _budget(classifier, config, views)
    for number, trial in enumerate(tried[len(done) :], len(done)):
        shutil.rmtree(folder, ignore_errors=True)
        short = dataclasses.replace(trial, epochs=config.search_epochs, steps=None, patience=0, resume=False)
        attached = attach_methods(classifier, short, views.data)
        try:
            taught = Teacher(classifier, attached, views, short, folder, accelerator, features=features).teach()
        finally:
            for attachment in reversed(attached):
                attachment.detach()
        if taught.best is None:
            raise KeyboardInterrupt
        accuracy, loss = taught.best.val_accuracy, taught.best.val_loss
        done.append({"learning_rate": trial.rate(), "options": trial.options, "val_accuracy": accuracy, "val_loss": loss})
        if accelerator.is_main_process:
            write_json(file, done)
            rate, options = trial.rate(), dict(trial.options)
            _log.info("trial %d of %d: learning rate %g, %s: %.1f%%", number + 1, len(tried), rate, options, 100 * accuracy)
    shutil.rmtree(folder, ignore_errors=True)
    best = min(range(len(done)), key=lambda i: (-done[i]["val_accuracy"], done[i]["val_loss"], i))
    return dataclasses.replace(tried[best], search=config.search)


def _budget(classifier: Classifier, config: TransferConfig, views: Views) -> list[TransferConfig]:
    """The trials that are worth their time."""
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
