"""Building of optimizers, with the learning rate of each parameter group."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..errors import TrainError
from .arguments import parse_arguments
from .catalog import BUILT_IN, EAGER, OptimizerWarning, canonical_name, is_learning_rate_free, load_class
from .resume_check import check_resume

TRUSTED = ("adamw", "sgd", "adafactor")
"""Names that are built without a trial."""


class ParameterGroup(TypedDict, total=False):
    """A parameter group with learning rate `learning_rate * lr_scale` and optionally its own weight decay."""

    params: Iterable[Tensor]
    lr_scale: float
    name: str
    weight_decay: float


def base_rate(name: str, learning_rate: float) -> float:
    """Base learning rate: `learning_rate`, but 1.0 for Prodigy and D-Adaptation, which estimate their own."""
    return 1.0 if is_learning_rate_free(name) else learning_rate


def warn_ignored_rates(name: str, rates: Mapping[str, Any]) -> None:
    """Warns about learning rates that Prodigy and D-Adaptation ignore.

    Args:
        rates: option to the value that a user set; None or empty if not set.
    """
    ignored = tuple(option for option, value in rates.items() if value and value != 1)
    if ignored and is_learning_rate_free(name):
        message = f"{name} estimates the learning rate from a base of 1.0: {', '.join(ignored)} has no effect. Leave it out."
        warnings.warn(OptimizerWarning(message, where=name, given=ignored, expected=1.0), stacklevel=3)


def build(
    name: str,
    groups: Sequence[ParameterGroup],
    learning_rate: float,
    weight_decay: float = 0.01,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """Builds an optimizer whose groups have `lr_scale` and `name`; `set_rates` sets their learning rates per step.

    Prodigy and D-Adaptation require one learning rate for all groups, so `lr_scale` is set to 1. First, a trial with small
    parameters of the same dimensions checks that the optimizer trains them and resumes exactly from its state.

    Args:
        name: as in `catalog`. arguments: of its class, values or texts.

    Raises:
        TrainError: an unknown name or argument, a group without parameters, or an optimizer that cannot train or resume exactly.
        MissingExtra: the optimizer's package is not installed.
    """
    name = canonical_name(name)
    prepared = [_prepare(index, group, name, learning_rate, weight_decay) for index, group in enumerate(groups)]
    settings = parse_arguments(name, arguments)
    base = base_rate(name, learning_rate)
    if name not in TRUSTED or settings:
        check_resume(name, [p for group in prepared for p in group["params"]], lambda trial: _make(name, trial, base, settings))
    return _make(name, prepared, base, settings)


def group_settings(groups: Sequence[ParameterGroup]) -> list[list[Any]]:
    """Name, rate, decay and number of tensors of each group, which must match on resume."""
    return [[g.get("name"), g.get("lr_scale", 1.0), g.get("weight_decay"), len(list(g["params"]))] for g in groups]


def _prepare(index: int, group: ParameterGroup, name: str, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """A parameter group with the entries of an optimizer."""
    params, label = list(group["params"]), group.get("name", f"group {index}")
    if not params:
        raise TrainError(f"parameter group {label!r} is empty", where=label, given=0)
    scale = 1.0 if is_learning_rate_free(name) else group.get("lr_scale", 1.0)
    rate, decay = base_rate(name, learning_rate) * scale, group.get("weight_decay", weight_decay)
    return {"params": params, "lr": rate, "weight_decay": decay, "lr_scale": scale, "name": label}


def _make(name: str, groups: list[dict[str, Any]], rate: float, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer; errors of its constructor as `TrainError`."""
    cls = load_class(name)
    try:
        if name in BUILT_IN or "." in name:
            defaults = BUILT_IN[name].defaults if name in BUILT_IN else {}
            has_rate = "lr" in inspect.signature(cls).parameters
            optimizer = cls(groups, **{**({"lr": rate} if has_rate else {}), **defaults, **settings})
        else:
            from timm.optim._optim_factory import create_optimizer_v2

            optimizer = create_optimizer_v2(groups, opt=name, lr=rate, **settings)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError) as error:
        message = f"optimizer {name!r} cannot be built for these parameters: {error}"
        raise TrainError(message, where="optimizer", given=name, expected=str(error)) from error
    if cls.__name__ in EAGER:
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group to `rate * lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
