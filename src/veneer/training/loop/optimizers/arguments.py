"""Arguments of an optimizer from texts `key=value`, checked against the signature of its class."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import TrainError
from .catalog import load_class

FROM_OPTIONS = {"params": "", "lr": "--learning-rate", "weight_decay": "--weight-decay"}
"""Arguments that options of a run set."""


def parse_arguments(optimizer: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the class takes them.

    Args:
        optimizer: name in `catalog.names()`, or the path of a class.
        arguments: name to a value or to its text: `0.9,0.99` is a tuple, `true` a bool, and `bfloat16` a dtype if the class takes
            one.

    Raises:
        TrainError: an argument that the class does not have or that an option sets, or a value of another type than the default.
    """
    if not arguments:
        return {}
    parameters = inspect.signature(load_class(optimizer)).parameters
    return {key: _value(optimizer, key, value, _parameter(optimizer, key, parameters)) for key, value in arguments.items()}


def _parameter(optimizer: str, key: str, parameters: Mapping[str, inspect.Parameter]) -> inspect.Parameter | None:
    """The parameter of the signature; None if the class accepts any name."""
    known = tuple(name for name in parameters if name not in (*FROM_OPTIONS, "args", "kwargs"))
    if key in FROM_OPTIONS:
        option = FROM_OPTIONS[key]
        hint = f"set it with {option}" if option else "the run sets it"
        message = f"optimizer_args: {key} is not an argument of {optimizer} that can be set here; {hint}."
        raise TrainError(message, where="optimizer_args", given=key, expected=option or known)
    if key in parameters:
        return parameters[key]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    close = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}."
    message = f"optimizer_args: {optimizer} has no argument {key!r}; {hint}"
    raise TrainError(message, where="optimizer_args", given=key, expected=tuple(close) or known)


def _value(optimizer: str, key: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    parsed = _literal(value) if isinstance(value, str) else value
    if isinstance(default, torch.dtype) or (parameter is not None and "dtype" in str(parameter.annotation)):
        parsed = getattr(torch, str(value).removeprefix("torch."), None)
        _check(optimizer, key, value, isinstance(parsed, torch.dtype), "a dtype, such as bfloat16")
    elif isinstance(default, bool):
        _check(optimizer, key, value, isinstance(parsed, bool), "true or false")
    elif isinstance(default, (int, float)):
        _check(optimizer, key, value, _is_number(parsed), "a number")
    elif isinstance(default, (tuple, list)):
        parsed = tuple(parsed) if isinstance(parsed, list) else parsed
        fits = isinstance(parsed, tuple) and len(parsed) == len(default)
        _check(optimizer, key, value, fits, f"{len(default)} values, such as {','.join(map(str, default))}")
    elif isinstance(default, str):
        parsed = value
        _check(optimizer, key, value, isinstance(value, str), f"a name, such as {default}")
    return parsed


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _literal(text: str) -> Any:
    """The value of JSON or Python in a text, or the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _check(optimizer: str, key: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        message = f"optimizer_args: {key} of {optimizer} is {value!r}; expected {expected}."
        raise TrainError(message, where=f"optimizer_args.{key}", given=value, expected=expected)
