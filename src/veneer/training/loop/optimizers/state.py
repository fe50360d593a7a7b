"""Conversion of an optimizer's state to named tensors and JSON values, without pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError

FROM_CONFIG = ("params", "lr", "lr_scale", "name", "weight_decay")
"""Entries of a parameter group that come from the config, not from checkpoints."""
_PLAIN = (type(None), bool, int, float, str)


def pack(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer state as tensors (key `parameter:entry`) and JSON values, by parameter name.

    Args:
        optimizer: any optimizer whose state, per parameter, per group and of the whole, has tensors, plain values and dtypes, or
            lists, tuples and dicts of them.
        named: the parameters by name.

    Raises:
        TrainError: the state has an entry of another type.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"kind": type(optimizer).__name__, "groups": [], "state": {}}
    for index, group in enumerate(optimizer.param_groups):
        entries = {key: value for key, value in group.items() if key not in FROM_CONFIG}
        values["groups"].append(_split(f"group {index}", entries, group["params"][0].device, tensors))
    for name, parameter in named.items():
        if parameter in optimizer.state:
            values["state"][name] = _split(name, optimizer.state[parameter], parameter.device, tensors)
    if others := _other_entries(optimizer):
        values["others"] = _split("optimizer", others, None, tensors)
    return tensors, values


def _other_entries(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Entries that an optimizer adds to its state dict, such as the state of a random generator."""
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return {}
    return {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}


def _split(owner: str, entries: Mapping[str, Any], device: torch.device | None, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Moves tensors to `tensors`; the returned values have the device of each: that of its parameter, or the CPU."""
    return {key: _encode(f"{owner}:{key}", value, device, tensors) for key, value in entries.items()}


def _encode(place: str, value: Any, device: torch.device | None, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; tensors are moved to `tensors` under `place`."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": "parameter" if value.device == device else "cpu"}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        parts = [_encode(f"{place}.{i}", part, device, tensors) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(f"{place}.{key}", part, device, tensors) for key, part in value.items()}}
    raise TrainError(
        f"the optimizer state {place} is a {type(value).__name__}, which cannot be saved. Choose another optimizer.",
        where=place,
        given=type(value).__name__,
    )


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
        for key, value in _join(f"group {index}", saved, group["params"][0].device, tensors).items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    optimizer.state.clear()
    for name, saved in values["state"].items():
        parameter = named[name]
        optimizer.state[parameter] = _join(name, saved, parameter.device, tensors)
    if "others" in values:
        others = _join("optimizer", values["others"], torch.device("cpu"), tensors)
        optimizer.load_state_dict({**optimizer.state_dict(), **others})


def _join(owner: str, values: Mapping[str, Any], device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: _decode(f"{owner}:{key}", value, device, tensors) for key, value in values.items()}


def _decode(place: str, value: Any, device: torch.device, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `_encode` saved."""
    if isinstance(value, list):
        return [_decode(f"{place}.{i}", part, device, tensors) for i, part in enumerate(value)]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[place].to(device if content == "parameter" else "cpu", copy=True)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tuple":
        return tuple(_decode(f"{place}.{i}", part, device, tensors) for i, part in enumerate(content))
    return {key: _decode(f"{place}.{key}", part, device, tensors) for key, part in content.items()}


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
