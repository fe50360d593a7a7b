"""Optimizer, schedule and timestep sampling of another trainer as options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.injection.errors import MissingExtra
from veneer.training.loop.errors import TrainError
from veneer.training.loop.optimizers import canonical_name, parse_arguments
from veneer.training.loop.schedule import SCHEDULES
from veneer.training.objective.timestep_sampling import DENSITIES

from .source_table import SourceTable

SAME_OPTIMIZER = {
    "adam": "adamw",
    "adam8bit": "adamw8bit",
    "sgdnesterov": "sgd",
    "prodigyopt": "prodigy",
}
SAME_DENSITY = {"sigma": "uniform", "linear": "uniform", "weighted": "uniform"}


def set_optimizer(source: SourceTable, options: dict[str, Any], key: str, arguments: str) -> None:
    """The optimizer and its weight decay.

    Args:
        key, arguments: names of the optimizer and of its arguments, `["weight_decay=0.1"]` or a table.
    """
    given = source.take(key)
    if given is not None:
        name = str(given).lower().replace("_", "").replace("-", "")
        try:
            options["optimizer"] = canonical_name(SAME_OPTIMIZER.get(name, str(given)))
        except TrainError as error:
            source.remark("left_out", key, f"{error}; adamw is used")
        else:
            if name in SAME_OPTIMIZER:
                source.remark("changed", key, f"{options['optimizer']} is used")
    extra = source.take(arguments, {})
    texts = extra.split() if isinstance(extra, str) else extra
    pairs = texts if isinstance(texts, Mapping) else dict(str(text).partition("=")[::2] for text in texts)
    for name, value in pairs.items():
        if name == "weight_decay":
            options["weight_decay"] = float(value)
            continue
        try:
            parse_arguments(options.get("optimizer", "adamw"), {name: value})
        except (TrainError, MissingExtra) as error:
            source.content[f"{arguments}.{name}"] = value
            source.remark("left_out", f"{arguments}.{name}", str(error))
        else:
            options.setdefault("optimizer_args", {})[name] = value


def set_schedule(source: SourceTable, options: dict[str, Any], key: str, warmup: str) -> None:
    """The learning-rate schedule and its warm-up: steps, or a share of the steps below 1."""
    given = source.take(key)
    if given is not None:
        if given in SCHEDULES:
            options["schedule"] = given
        else:
            source.remark("left_out", key, f"expected one of {', '.join(SCHEDULES)}; constant is used")
            options["schedule"] = "constant"
    steps = source.take(warmup)
    if steps:
        options["warmup"] = int(steps) if float(steps) >= 1 else round(float(steps) * options.get("steps", 0))


def set_timesteps(source: SourceTable, options: dict[str, Any], key: str) -> None:
    """The density of timesteps."""
    given = source.take(key)
    if given is None:
        return
    name = SAME_DENSITY.get(given, given)
    if name in DENSITIES:
        options["timestep_sampling"] = name
        if given == "weighted":
            source.remark("changed", key, "timesteps are uniform, without weights")
    else:
        source.remark("left_out", key, f"expected one of {', '.join(DENSITIES)}; the default of the base model is used")
