"""Skips parameter initialization when a checkpoint will overwrite it, and limits the size of adapters to what a file holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import OptionError

_DEFERRED: ContextVar[bool] = ContextVar("init_deferred", default=False)
_LIMITS: ContextVar[Mapping[str, int] | None] = ContextVar("size_limits", default=None)


@contextlib.contextmanager
def defer_init() -> Iterator[None]:
    """Inside it, initialization is skipped: all tensors of new attachments are loaded afterwards, or the attach is undone."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def is_init_deferred() -> bool:
    """True inside `defer_init`: an adapter's `enter` may skip computations whose result will be overwritten."""
    return _DEFERRED.get()


@contextlib.contextmanager
def limit_sizes(held: Mapping[str, int], whole: bool) -> Iterator[None]:
    """Inside it, adapters that are much larger than their tensors in the file are rejected before they are built.

    Args:
        held: parameters in the file by site name, and their total under "".
        whole: True if the file should hold all of each adapter, False if parts may be missing.
    """
    margin = 2**16 if whole else 2**20
    token = _LIMITS.set({name: 4 * count + margin for name, count in held.items()} | {"else": margin})
    try:
        yield
    finally:
        _LIMITS.reset(token)


def is_loading() -> bool:
    """True inside `limit_sizes`: the options are from a file, possibly of an older version that did not reject unused keys."""
    return _LIMITS.get() is not None


def check_size(count: Callable[[], int], name: str) -> None:
    """Checks inside `limit_sizes` that an adapter is not too large for its file. `count()` runs on `meta`.

    Args:
        count: returns the number of parameters. `name`: the site, or "" for parameters that sites share.
    Raises:
        OptionError: it is too large. Nothing has been allocated.
    """
    held = _LIMITS.get()
    if held is None:
        return
    with torch.device("meta"):
        wanted = count()
    most = held.get(name, held["else"])
    if wanted > most:
        message = f"the config implies {wanted:,} parameters, more than the file contains; the file is corrupt."
        raise OptionError(message, where=name, given=wanted, expected=most)


def zeros(*shape: int) -> torch.Tensor:
    """Initial zeros; inside `defer_init` uninitialized memory. For large parameters that every file holds."""
    return torch.empty(shape) if is_init_deferred() else torch.zeros(shape)


def build_context(device: torch.device) -> AbstractContextManager[Any]:
    """Context for building adapters: inside `defer_init` and on `meta`, random initialization is skipped, which is slow."""
    return SkipInit() if device.type == "meta" or is_init_deferred() else contextlib.nullcontext()


class SkipInit(TorchFunctionMode):
    """Inside it, functions that initialize a parameter in place do nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        target = args[0] if args else named.get("tensor")
        if func in INIT_FUNCTIONS and isinstance(target, nn.Parameter):
            return target
        return func(*args, **named)


INIT = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)  # these are dispatched as a whole
INIT_FUNCTIONS = {torch.Tensor.uniform_, torch.Tensor.normal_, *INIT}
