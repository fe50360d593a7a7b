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

from ..errors import OptionError

_FOLLOW: ContextVar[bool] = ContextVar("values_follow", default=False)
_HELD: ContextVar[Mapping[str, int] | None] = ContextVar("values_held", default=None)


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


@contextlib.contextmanager
def claiming(held: Mapping[str, int], whole: bool) -> Iterator[None]:
    """Inside it, no adapter is built that is much larger than what a file holds for it.

    Args:
        held: numbers by site name, and in all under "". `whole`: all of an adapter should be there, else parts may lack.
    """
    room = 2**16 if whole else 2**20
    token = _HELD.set({name: 4 * count + room for name, count in held.items()} | {"else": room})
    try:
        yield
    finally:
        _HELD.reset(token)


def is_loading() -> bool:
    """True inside `claiming`: the options are a file's, maybe of an older veneer that did not reject idle keys."""
    return _HELD.get() is not None


def refuse_claim(count: Callable[[], int], name: str) -> None:
    """Raise inside `claiming` if `count()` numbers are more than a file can mean at the site `name`; "" for what sites share.

    Raises:
        ValueError: they are. Nothing has been allocated then.
    """
    held = _HELD.get()
    if held is None:
        return
    with torch.device("meta"):
        wanted = count()
    most = held.get(name, held["else"])
    if wanted > most:
        message = f"the options ask for {wanted:,} numbers, which the file does not hold. It is damaged."
        raise OptionError(message, where=name, given=wanted, expected=most)


def zeros(*shape: int) -> torch.Tensor:
    """Zeros to begin with; inside `filling` whatever is in memory. For large parameters only, which are sure to be saved."""
    return torch.empty(shape) if values_follow() else torch.zeros(shape)


def drawing(device: torch.device) -> AbstractContextManager[Any]:
    """Where adapters are built: inside `filling`, and on `meta`, parameters are left undrawn, because drawing takes long."""
    return Undrawn() if device.type == "meta" or values_follow() else contextlib.nullcontext()


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
