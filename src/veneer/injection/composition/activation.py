"""Enables some attachments of a model and disables the others, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from ..attachment.attach import attachments
from ..attachment.attachment import Attachment
from ..errors import StateError, UnknownName

Switch = tuple[float, bool]  # scale, enabled


class Activation:
    """Result of `activate`: a context manager that restores the previous scales at its end. `undo()` does so as well."""

    def __init__(self, before: Mapping[Attachment, Switch]) -> None:
        self._before = dict(before)

    def undo(self) -> None:
        """Restores the scales from before the call. A second call does nothing."""
        before, self._before = self._before, {}
        _write(before)

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def activate(model: Any, chosen: str | Iterable[str] | Mapping[str, float]) -> Activation:
    """Enables the named attachments and disables all others: `activate(model, {"style": 0.8, "face": 0.5})`. All or nothing.

    Writes only the buffers of attachments that change, so a compiled model is not compiled again. Merged attachments that are not
    named are part of the base model and stay merged.

    Args:
        model: the module or pipeline of the attachments.
        chosen: names to scales (0 the host, 1 as trained), or only names, which keep their scales; empty for the base model.
    Returns:
        A context manager: `with activate(model, "style"): …` restores the previous scales at its end. Without `with` they stay.
    Raises:
        UnknownName: no attachment has this name; lists the names. StateError: a named attachment is merged or does not support
            the scale. Nothing is changed then.
    """
    attached = {a.name: a for a in attachments(model)}
    scales: dict[str, float | None] = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(_as_names(chosen))
    for name in scales:
        if find_attachment(attached, name).merged:
            message = f"activate: '{name}' is merged. Call its unmerge() first, or do not name it: it is part of the base model."
            raise StateError(message, where=name, given="merged")
    switches: dict[Attachment, Switch] = {}
    for name, attachment in attached.items():
        if not attachment.merged:
            scale = scales.get(name)
            switches[attachment] = (attachment.scale if scale is None else float(scale), name in scales)
    return set_switches(switches)


def set_switches(switches: Mapping[Attachment, Switch]) -> Activation:
    """Sets scale and enabled state of several attachments. All or nothing.

    Raises:
        StateError: an attachment does not support its scale.
    """
    activation = Activation({a: (a._scale, a.is_enabled) for a in switches})
    try:
        _write(switches)
    except BaseException:
        activation.undo()
        raise
    return activation


def _write(switches: Mapping[Attachment, Switch]) -> None:
    for attachment, new in switches.items():
        if new != (attachment._scale, attachment.is_enabled):
            attachment._write(*new)


def find_attachment(attached: Mapping[str, Attachment], name: str) -> Attachment:
    """The attachment with this name.

    Raises:
        UnknownName: no attachment has this name.
    """
    if name not in attached:
        message = f"no attachment '{name}' on this model. Attachments: {', '.join(attached) or 'none'}."
        raise UnknownName(message, name, "attachment", expected=tuple(attached))
    return attached[name]


def _as_names(chosen: str | Iterable[str]) -> Iterable[str]:
    return (chosen,) if isinstance(chosen, str) else chosen
