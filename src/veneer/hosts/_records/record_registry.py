"""Registry of the records of model families: modules of this package, and records of other packages."""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, TypeVar

from veneer.discovery import find_entries
from veneer.injection.errors import VeneerError

from . import load_records
from .model_record import ModelRecord

R = TypeVar("R", bound=ModelRecord)


class RecordRegistry(Generic[R]):
    """Records by name. Imports no library of models.

    Args:
        kind: class of the records. `package`: package whose sub-packages have a module with a `RECORD` for each family.
        group: entry-point group of other distributions; an entry point is a record, and its name that of the family.
    """

    def __init__(self, kind: type[R], package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._sources: dict[str, str] = {}
        self._records: dict[str, R] = {}

    def records(self) -> dict[str, R]:
        """The record of every family by its name, the families of this package first.

        Raises:
            VeneerError: a name, a class or a small model is provided twice, or an entry point is not a record.
        """
        if not self._records:
            try:
                self._load()
            except BaseException:
                self._records, self._sources = {}, {}  # the next call raises again
                raise
        return self._records

    def register(self, name: str, record: R) -> R:
        """Adds a record in this process, for notebooks and tests.

        Raises:
            VeneerError: the name, a class or a small model of the record is taken, or it is not a record.
        """
        self.records()
        self._add(name, record, "register()")
        return record

    def unregister(self, name: str) -> None:
        """Removes a record that `register` added.

        Raises:
            VeneerError: `register` added no record of this name.
        """
        if self._sources.get(name) != "register()":
            expected = tuple(key for key, source in self._sources.items() if source == "register()")
            message = (
                f"{self.group}: '{name}' was not registered in this process; expected one of: {', '.join(expected) or 'none'}."
            )
            raise VeneerError(message, where=name, given=self._sources.get(name), expected=expected)
        del self._records[name], self._sources[name]

    def _load(self) -> None:
        for name, record in load_records(self.package).items():
            self._add(name, record, "veneer")
        for entry in find_entries(self.package, self.group):
            if entry.point is not None:
                self._add(entry.name, entry.point.load(), entry.source)

    def _add(self, name: str, record: R, source: str) -> None:
        if not isinstance(record, self.kind):
            message = f"{self.group}: '{name}' from {source} is {record!r}; expected a {self.kind.__name__}."
            raise VeneerError(message, where=name, given=record, expected=self.kind)
        for other, known in self._records.items():
            if shared := [*_shared((name,), (other,), "name"), *_common_names(record, known)]:
                message = (
                    f"{self.group}: {shared[0]} of {source} is already provided by '{other}' of {self._sources[other]}. Rename "
                    "it, or uninstall one of the distributions."
                )
                raise VeneerError(message, where=name, given=shared[0], expected=self._sources[other])
        self._records[name], self._sources[name] = record, source


def _common_names(record: ModelRecord, known: ModelRecord) -> list[str]:
    """Classes and small models that two records have in common."""
    classes = _shared(record.classes, known.classes, "class") if record.top_package == known.top_package else []
    return [*classes, *_shared(record.tiny, known.tiny, "small model")]


def _shared(names: Collection[str], known: Collection[str], kind: str) -> list[str]:
    return [f"{kind} '{name}'" for name in names if name in known]
