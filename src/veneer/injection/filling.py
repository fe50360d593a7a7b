"""Whether an attach is followed by loading every value, so that what adapters begin as need not be found out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

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
