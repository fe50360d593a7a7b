"""Optimizers by name, and conversion of their state to named tensors and JSON values, without pickle."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from veneer.injection.errors import MissingExtra

from .errors import TrainError


class ParameterGroup(TypedDict, total=False):
    """A parameter group with learning rate `learning_rate * lr_scale` and optionally its own weight decay."""

    params: Iterable[Tensor]
    lr_scale: float
    name: str
    weight_decay: float


FROM_CONFIG = ("params", "lr", "lr_scale", "name", "weight_decay")
"""Entries of a parameter group that come from the config, not from checkpoints."""


_PLAIN = (type(None), bool, int, float, str)


def _extra(module: str, name: str, extra: str, optimizer: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingExtra(
            f"optimizer {optimizer!r} needs {module}, which does not import here ({error}): pip install 'veneer[{extra}]'",
            where=optimizer,
            given=module.partition(".")[0],
            expected=extra,
            library=module.partition(".")[0],
            extra=extra,
        ) from error


def _adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)


def _adamw8bit(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    kind = _extra("bitsandbytes.optim", "AdamW8bit", "8bit", "adamw8bit")
    return kind(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)


def _prodigy(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    kind = _extra("prodigyopt", "Prodigy", "prodigy", "prodigy")
    return kind(groups, lr=lr, betas=(0.9, 0.99), use_bias_correction=True, safeguard_warmup=True)  # beta3 = sqrt(beta2)


def _sgd(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def _adafactor(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=lr)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
    "sgd": _sgd,
    "adafactor": _adafactor,
}


def base_rate(name: str, learning_rate: float) -> float:
    """Base learning rate: `learning_rate`, but 1.0 for Prodigy, which adapts its own."""
    return 1.0 if name == "prodigy" else learning_rate


def build(name: str, groups: Sequence[ParameterGroup], learning_rate: float, weight_decay: float = 0.01) -> torch.optim.Optimizer:
    """Builds an optimizer whose groups have `lr_scale` and `name`; `set_rates` sets their learning rates per step.

    Prodigy requires one learning rate for all groups, so `lr_scale` is set to 1.

    Raises:
        TrainError: an unknown name, or a group without parameters.
        MissingExtra: the optimizer's package is not installed.
    """
    if name not in OPTIMIZERS:
        raise TrainError(
            f"optimizer is {name!r}; expected one of {', '.join(OPTIMIZERS)}",
            where="optimizer",
            given=name,
            expected=tuple(OPTIMIZERS),
        )
    base = base_rate(name, learning_rate)
    prepared: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        params = list(group["params"])
        label = group.get("name", f"group {index}")
        if not params:
            raise TrainError(f"parameter group {label!r} is empty", where=label, given=0)
        scale = 1.0 if name == "prodigy" else group.get("lr_scale", 1.0)
        decay = group.get("weight_decay", weight_decay)
        prepared.append({"params": params, "lr": base * scale, "weight_decay": decay, "lr_scale": scale, "name": label})
    return OPTIMIZERS[name](prepared, base)


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group to `rate * lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def pack(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer state as tensors (key `parameter:entry`) and JSON values, by parameter name.

    Args:
        optimizer: any optimizer whose state has tensors and plain values, per parameter and per group.
        named: the parameters by name.

    Raises:
        TrainError: the state has an entry that is neither a tensor nor a plain value.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"kind": type(optimizer).__name__, "groups": [], "state": {}}
    for index, group in enumerate(optimizer.param_groups):
        entries = {key: value for key, value in group.items() if key not in FROM_CONFIG}
        values["groups"].append(_split(f"group {index}", entries, None, tensors))
    for name, parameter in named.items():
        if parameter in optimizer.state:
            values["state"][name] = _split(name, optimizer.state[parameter], parameter.device, tensors)
    return tensors, values


def _split(owner: str, entries: Mapping[str, Any], device: torch.device | None, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Moves tensors to `tensors`; the returned values have the device of each: that of its parameter, or the CPU."""
    values: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{owner}:{key}"] = value
            values[key] = {"tensor": "parameter" if value.device == device else "cpu"}
        elif isinstance(value, _PLAIN):
            values[key] = value
        elif isinstance(value, (list, tuple)) and all(isinstance(part, _PLAIN) for part in value):
            values[key] = list(value)
        else:
            raise TrainError(
                f"the optimizer state {key!r} of {owner} is a {type(value).__name__}, which cannot be saved",
                where=f"{owner}:{key}",
                given=type(value).__name__,
            )
    return values


def unpack(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Restores the state from `pack`: same dtypes and values, each tensor on its parameter's device or the CPU.

    The state of another optimizer class is ignored; this one starts with a new state.

    Raises:
        TrainError: another number of groups, or state of an unknown parameter.
    """
    if values["kind"] != type(optimizer).__name__:
        return
    if len(values["groups"]) != len(optimizer.param_groups):
        raise TrainError(
            f"the saved optimizer has {len(values['groups'])} parameter groups; expected {len(optimizer.param_groups)}",
            where="groups",
            given=len(values["groups"]),
            expected=len(optimizer.param_groups),
        )
    unknown = sorted(set(values["state"]) - set(named))
    if unknown:
        message = f"the saved optimizer has state for unknown parameters: {', '.join(unknown[:5])}"
        raise TrainError(message, where="parameters", given=tuple(unknown))
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, values["groups"], strict=True)):
        for key, value in _join(f"group {index}", saved, torch.device("cpu"), tensors).items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    optimizer.state.clear()
    for name, saved in values["state"].items():
        parameter = named[name]
        optimizer.state[parameter] = _join(name, saved, parameter.device, tensors)


def _join(owner: str, values: Mapping[str, Any], device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    entries = dict(values)
    for key, value in values.items():
        if isinstance(value, dict):
            entries[key] = tensors[f"{owner}:{key}"].to(device if value["tensor"] == "parameter" else "cpu", copy=True)
    return entries


def names_of(parameters: Sequence[Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by name, in the order of `named`; a tensor with several names gets the first."""
    names: dict[int, str] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), name)
    for index, parameter in enumerate(parameters):
        name = names.get(id(parameter), "")
        if not name:
            message = f"parameter {index} of shape {tuple(parameter.shape)} has no name; add it to `named`"
            raise TrainError(message, where=f"parameter {index}", given=tuple(parameter.shape))
        if parameter.dtype != torch.float32 or not parameter.requires_grad:
            raise TrainError(
                f"{name} is {parameter.dtype} with requires_grad={parameter.requires_grad}; trainable tensors must be float32 "
                "and require a gradient, whatever the precision of the rest",
                where=name,
                given=(parameter.dtype, parameter.requires_grad),
                expected=(torch.float32, True),
            )
    selected = {id(parameter) for parameter in parameters}
    return {name: named[name] for key, name in names.items() if key in selected}
