"""Optimizer, schedule, sampler and timestep sampling of another trainer as options of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from veneer.base_models.schedulers import Scheduler
from veneer.injection.errors import MissingExtra
from veneer.training.loop.errors import TrainError
from veneer.training.loop.optimizers import canonical_name, parse_arguments
from veneer.training.loop.optimizers.catalog import BUILT_IN
from veneer.training.loop.schedule import SCHEDULES
from veneer.training.objective.timestep_sampling import DENSITIES

from .source_table import SourceTable

Table = Mapping[str, Mapping[str, Any]]
SAME_OPTIMIZER = {"prodigyopt": "prodigy"}
"""Other names of a known optimizer, without case and `_`, that are no aliases of the catalog."""
CLASSES = {f"{entry.module}.{entry.attribute}": name for name, entry in BUILT_IN.items()}
"""Path of the class of a known optimizer to its name."""
DECAYING = (
    "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "ademamix8bit", "paged_ademamix", "paged_ademamix8bit",
)  # fmt: skip
"""Optimizers whose class has a weight decay of 0.01, the default of a run; that of the others is 0."""
CLASS_ARGUMENTS: dict[str, dict[str, Any]] = {
    "prodigy": {"betas": [0.9, 0.999], "use_bias_correction": False, "safeguard_warmup": False},
    "sgd": {"momentum": 0.0},
}
"""Defaults of classes to which veneer passes other values."""
SAME_SCHEDULE = {"cosine_with_min_lr": "cosine"}
SCHEDULE_ARGUMENTS = {"power": "power", "min_lr_ratio": "min_lr_ratio", "min_lr_rate": "min_lr_ratio"}
WHOLE_ARGUMENTS = {"num_cycles": "cycles", "num_warmup_steps": "warmup"}
SMALLEST_RATES = ("eta_min", "min_lr", "lr_end")
"""Arguments of schedules that are the learning rate at the end."""
SAMPLERS = {
    "k_lms": "lms",
    "k_euler": "euler",
    "euler_a": "euler_ancestral",
    "k_euler_a": "euler_ancestral",
    "dpm_2": "dpm2",
    "k_dpm_2": "dpm2",
    "dpm_2_a": "dpm2_ancestral",
    "k_dpm_2_a": "dpm2_ancestral",
    "dpmsolver++": "dpmpp_2m",
    "k_dpmsolver++": "dpmpp_2m_karras",
    "flowmatch": "flow_euler",
}
"""Sampler of sd-scripts or ai-toolkit to the scheduler; others have the same name or none."""
SCHEDULERS = get_args(Scheduler)
SAME_DENSITY = {"sigma": "uniform", "linear": "uniform", "weighted": "uniform"}


def set_optimizer(
    source: SourceTable, options: dict[str, Any], key: str, arguments: str, defaults: Table = MappingProxyType({})
) -> None:
    """The optimizer, its arguments and its weight decay; defaults of its class are written where those of a run differ.

    Args:
        key, arguments: names of the optimizer and of its arguments, `["weight_decay=0.1"]` or a table.
        defaults: optimizer to the arguments that the other trainer passes by default.
    """
    optimizer, name = source.take(key), "adamw"
    if optimizer is not None:
        try:
            name = options["optimizer"] = _known_optimizer(str(optimizer))
        except TrainError as error:
            source.remark("left_out", key, f"{error}; adamw is used")
    is_known = optimizer is None or "optimizer" in options
    values = {**CLASS_ARGUMENTS.get(name, {}), **defaults.get(name, {})} if is_known else {}
    for argument, value in pairs_of(source.take(arguments, {})).items():
        if argument == "weight_decay":
            options["weight_decay"] = float(value)
            continue
        try:
            parse_arguments(name, {argument: value})
        except (TrainError, MissingExtra) as error:
            source.content[f"{arguments}.{argument}"] = value
            source.remark("left_out", f"{arguments}.{argument}", str(error))
        else:
            values[argument] = value
    if values:
        options["optimizer_args"] = values
    if is_known and name not in DECAYING:
        options.setdefault("weight_decay", 0.0)


def _known_optimizer(text: str) -> str:
    """The name in the catalog of an optimizer, or of its class. No module that the file names is imported.

    Raises:
        TrainError: an unknown name, or the path of another class.
    """
    plain = text.lower().replace("_", "").replace("-", "")
    known = CLASSES.get(text) or canonical_name(SAME_OPTIMIZER.get(plain, text))
    if "." in known:
        message = f"{text} is the path of a class, whose module a run would import; set optimizer if you trust the module"
        raise TrainError(message, where="optimizer", given=text, expected="a name of the catalog")
    return known


def set_schedule(source: SourceTable, options: dict[str, Any], key: str, warmup: str, arguments: str) -> None:
    """The learning-rate schedule, its arguments and its warm-up: steps, or a share of the steps below 1.

    Args:
        key, warmup, arguments: names of the schedule, of its warm-up and of its arguments, `["power=2"]` or a table.
    """
    schedule = source.take(key)
    if schedule is not None:
        name = SAME_SCHEDULE.get(schedule, schedule)
        if name in SCHEDULES:
            options["schedule"] = name
        else:
            source.remark("left_out", key, f"expected one of {', '.join(SCHEDULES)}; constant is used")
            options["schedule"] = "constant"
    for argument, value in pairs_of(source.take(arguments, {})).items():
        _set_schedule_argument(source, options, argument, value, arguments)
    steps = source.take(warmup)
    if steps:
        options["warmup"] = int(steps) if float(steps) >= 1 else round(float(steps) * options.get("steps", 0))


def _set_schedule_argument(source: SourceTable, options: dict[str, Any], name: str, value: Any, place: str) -> None:
    """One argument of the schedule. A smallest learning rate becomes its ratio to the learning rate."""
    rate = options.get("learning_rate")
    number = _number(value)
    if number is not None and name in SCHEDULE_ARGUMENTS:
        options[SCHEDULE_ARGUMENTS[name]] = number
    elif number is not None and name in WHOLE_ARGUMENTS and number == int(number) >= 1:
        options[WHOLE_ARGUMENTS[name]] = int(number)
    elif number is not None and name in SMALLEST_RATES and rate:
        options["min_lr_ratio"] = number / rate
    else:
        source.content[f"{place}.{name}"] = value
        source.remark("left_out", f"{place}.{name}", "schedules have cycles (a whole number), power and min_lr_ratio")


def _number(value: Any) -> float | None:
    """The finite number in a value or its text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def pairs_of(arguments: Any) -> Mapping[str, Any]:
    """Arguments of a class as a mapping: a table, `["betas=0.9,0.99"]` or one text with spaces."""
    texts = arguments.split() if isinstance(arguments, str) else arguments
    return texts if isinstance(texts, Mapping) else dict(str(text).partition("=")[::2] for text in texts)


def set_sampler(source: SourceTable, options: dict[str, Any], key: str) -> None:
    """The scheduler (sampler) of previews."""
    sampler = source.take(key)
    if sampler is None:
        return
    name = SAMPLERS.get(str(sampler), str(sampler))
    if name in SCHEDULERS:
        options["preview_scheduler"] = name
        if str(sampler).startswith("k_") and not name.endswith("_karras"):
            source.remark("changed", key, f"{name} is used, with the noise levels of the base model's scheduler")
    else:
        reason = f"expected one of {', '.join(SCHEDULERS)}; the scheduler of the base model is used. Set preview_scheduler"
        source.remark("left_out", key, reason)


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
