"""Optimizer, schedule and timestep sampling of another trainer as options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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
SAME_DENSITY = {"sigma": "uniform", "linear": "uniform", "weighted": "uniform"}


def set_optimizer(
    source: SourceTable, options: dict[str, Any], key: str, arguments: str, defaults: Table = MappingProxyType({})
) -> None:
    """The optimizer, its arguments and its weight decay; defaults of its class are written where those of a run differ.

    Args:
        key, arguments: names of the optimizer and of its arguments, `["weight_decay=0.1"]` or a table.
        defaults: optimizer to the arguments that the other trainer passes by default.
    """
    given, name = source.take(key), "adamw"
    if given is not None:
        try:
            name = options["optimizer"] = _known_optimizer(str(given))
        except TrainError as error:
            source.remark("left_out", key, f"{error}; adamw is used")
    is_known = given is None or "optimizer" in options
    extra = source.take(arguments, {})
    texts = extra.split() if isinstance(extra, str) else extra
    pairs = texts if isinstance(texts, Mapping) else dict(str(text).partition("=")[::2] for text in texts)
    carried = {**CLASS_ARGUMENTS.get(name, {}), **defaults.get(name, {})} if is_known else {}
    for argument, value in pairs.items():
        if argument == "weight_decay":
            options["weight_decay"] = float(value)
            continue
        try:
            parse_arguments(name, {argument: value})
        except (TrainError, MissingExtra) as error:
            source.content[f"{arguments}.{argument}"] = value
            source.remark("left_out", f"{arguments}.{argument}", str(error))
        else:
            carried[argument] = value
    if carried:
        options["optimizer_args"] = carried
    if is_known and name not in DECAYING:
        options.setdefault("weight_decay", 0.0)


def _known_optimizer(given: str) -> str:
    """The name in the catalog of an optimizer, or of its class. No module that the file names is imported.

    Raises:
        TrainError: an unknown name, or the path of another class.
    """
    plain = given.lower().replace("_", "").replace("-", "")
    known = CLASSES.get(given) or canonical_name(SAME_OPTIMIZER.get(plain, given))
    if "." in known:
        message = f"{given} is the path of a class, whose module a run would import; set optimizer if you trust the module"
        raise TrainError(message, where="optimizer", given=given, expected="a name of the catalog")
    return known


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
