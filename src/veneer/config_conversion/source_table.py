"""A table of another trainer's config: which keys are read, and what is not carried over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values with which a feature is disabled."""


@dataclass(frozen=True)
class Remark:
    """A key of the other config that is not carried over as it is.

    Args:
        kind: `left_out` (not supported, or not needed), `changed` (carried over with another meaning), `unknown` (not a key that
            is known here) or `missing` (a run needs it, and the file does not have it).
        key: its name, with the tables around it, such as `datasets[0].subsets[1].color_aug`.
        value: its value. `reason`: why, and what to do.
    """

    kind: Literal["left_out", "changed", "unknown", "missing"]
    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        label = self.kind.replace("_", " ")
        value = "" if self.kind == "missing" else f" = {self.value!r}"
        return f"{label}: {self.key}{value}: {self.reason}"


@dataclass
class RunContent:
    """The options of a run as they are converted.

    Args:
        options: options of `veneer personalize`. `datasets`: its dataset tables. `methods`: method to its options.
        remarks: keys that are not carried over as they are.
    """

    options: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """The content of a config file."""
        tables = {"datasets": self.datasets} if self.datasets else {}
        return {**self.options, **{name: options for name, options in self.methods.items() if options}, **tables}


class SourceTable:
    """A table of the other config. A key that is neither taken nor explained is reported as unknown.

    Args:
        content: keys and values. `place`: prefix of its keys in remarks. `target`: receives the remarks.
    """

    def __init__(self, content: Mapping[str, Any], place: str, target: RunContent) -> None:
        self.content, self.place, self.target = dict(content), place, target
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read."""
        self._read.add(key)
        value = self.content.get(key)
        return default if value is None else value

    def remark(self, kind: Literal["left_out", "changed", "unknown", "missing"], key: str, reason: str) -> None:
        """Adds a remark on a key."""
        self._read.add(key)
        self.target.remarks.append(Remark(kind, f"{self.place}{key}", self.content.get(key), reason))

    def explain(self, reasons: Mapping[str, str]) -> None:
        """Reports keys that are not carried over; those with which a feature is disabled need no remark.

        Args:
            reasons: key to the reason.
        """
        for key, reason in reasons.items():
            if key in self.content and key not in self._read:
                if self.content[key] in OFF:
                    self._read.add(key)
                else:
                    self.remark("left_out", key, reason)

    def carry(
        self, names: Mapping[str, str], options: dict[str, Any], change: Callable[[Any], Any] = lambda value: value
    ) -> None:
        """Copies keys into the options of a run.

        Args:
            names: key to the name of the option. `options`: receives them. `change`: converts the values.
        """
        for key, name in names.items():
            value = self.take(key)
            if value is not None:
                options[name] = change(value)

    def unread(self) -> Iterator[str]:
        """Keys that were neither taken nor explained."""
        return (key for key in self.content if key not in self._read)

    def report_unknown(self) -> None:
        """Adds a remark for every key that was neither taken nor explained."""
        for key in list(self.unread()):
            self.remark("unknown", key, "not a key that is known here; check whether the run needs it")
