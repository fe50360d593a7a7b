"""Choosing which attachments of a model act, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from ..attachment.attach import attachments
from ..attachment.attachment import Attachment
from ..errors import StateError, UnknownName

Switch = tuple[float, bool]  # scale, on


class Activation:
    """What `activate` has done. As a context, or by `undo()`, the earlier strengths come back."""

    def __init__(self, before: Mapping[Attachment, Switch]) -> None:
        self._before = dict(before)

    def undo(self) -> None:
        """Put the strengths from before the call back. A second time does nothing."""
        before, self._before = self._before, {}
        _write(before)

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def activate(model: Any, chosen: str | Iterable[str] | Mapping[str, float]) -> Activation:
    """Let the named attachments act and no other: `activate(model, {"style": 0.8, "face": 0.5})`. All or nothing.

    Buffers are written, and only of attachments whose strength changes: no recompilation, and no cost for those that stay off.

    Args:
        model: the module or pipeline that they are attached to.
        chosen: names to strengths (0 the host, 1 as trained), or names alone, at the scale that they have; empty for the base.
    Returns:
        A context: `with activate(model, "style"): …` puts the earlier strengths back at its end. Without `with` they stay.
    Raises:
        UnknownName: a name that is not attached; it lists those that are. StateError: a named one is merged, or cannot have the
            strength. Nothing has been changed then. Those merged and not named are part of the base and stay.
    """
    there = {a.name: a for a in attachments(model)}
    given: dict[str, float | None] = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(_names(chosen))
    for name in given:
        if named(there, name).merged:
            message = f"activate: '{name}' is merged. Call its unmerge() first, or leave it out: it is part of the base."
            raise StateError(message, where=name, given="merged")
    wanted: dict[Attachment, Switch] = {}
    for name, attachment in there.items():
        if not attachment.merged:
            scale = given.get(name)
            wanted[attachment] = (attachment.scale if scale is None else float(scale), name in given)
    return switch(wanted)


def switch(wanted: Mapping[Attachment, Switch]) -> Activation:
    """Write (scale, on) of several attachments, or of none.

    Raises:
        StateError: one of them cannot have it.
    """
    done = Activation({a: (a._scale, a.is_enabled) for a in wanted})
    try:
        _write(wanted)
    except BaseException:
        done.undo()
        raise
    return done


def _write(switches: Mapping[Attachment, Switch]) -> None:
    for attachment, new in switches.items():
        if new != (attachment._scale, attachment.is_enabled):
            attachment._write(*new)


def named(there: Mapping[str, Attachment], name: str) -> Attachment:
    """The attachment of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in there:
        message = f"no attachment '{name}' on this model. There are: {', '.join(there) or 'none'}."
        raise UnknownName(message, name, "attachment", expected=tuple(there))
    return there[name]


def _names(chosen: str | Iterable[str]) -> Iterable[str]:
    return (chosen,) if isinstance(chosen, str) else chosen
