"""Whether an attach is followed by loading every value, so that what adapters begin as need not be found out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FOLLOW: ContextVar[bool] = ContextVar("values_follow", default=False)


@contextlib.contextmanager
def filling() -> Iterator[None]:
    """Inside it, all saved tensors of what is attached are written afterwards, or the attach is undone."""
    token = _FOLLOW.set(True)
    try:
        yield
    finally:
        _FOLLOW.reset(token)


def values_follow() -> bool:
    """True inside `filling`: an adapter's `enter` may leave out what would only be overwritten."""
    return _FOLLOW.get()


def drawing() -> AbstractContextManager[Any]:
    """Where adapters are built: inside `filling` parameters are left undrawn, because drawing takes longer than reading."""
    return Undrawn() if values_follow() else contextlib.nullcontext()


class Undrawn(TorchFunctionMode):
    """Inside it, what draws a parameter in place does nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        drawn = args[0] if args else named.get("tensor")
        if func in DRAWS and isinstance(drawn, nn.Parameter):
            return drawn
        return func(*args, **named)


INIT = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)  # these give themselves over as a whole
DRAWS = {torch.Tensor.uniform_, torch.Tensor.normal_, *INIT}
