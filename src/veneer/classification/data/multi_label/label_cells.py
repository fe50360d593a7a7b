"""Label cells of tables: one class name, or with `multi_label` several."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from ..labeled_images import some

SEPARATORS = ";|"
"""Separators of the labels in a cell."""


class LabelCellError(ValueError):
    """A label cell that cannot be read.

    Args:
        given: the cell. `expected`: what a cell may have.
    """

    def __init__(self, message: str, given: str, expected: str) -> None:
        super().__init__(message)
        self.given, self.expected = given, expected


def parse_labels(cell: str, multi_label: bool) -> tuple[str, ...]:
    """Names of the classes in a label cell.

    With `multi_label` they are the entries of a JSON list if the cell begins with `[`, else what `;` and `|` separate; empty and
    repeated names are left out. Without, the whole cell is one name.

    Raises:
        LabelCellError: an empty cell, invalid JSON, or a list without `multi_label`.
    """
    names = _json_names(cell) if cell.startswith("[") else None
    if not multi_label:
        if names is not None:
            raise LabelCellError(f"labels {cell}; expected one label. If images have several, pass --multi-label", cell, "label")
        names = (cell,)
    elif names is None:
        if cell.startswith("["):
            raise LabelCellError(f"labels {cell}; expected a JSON list of names, or names separated by ; or |", cell, "JSON list")
        names = tuple(re.split(f"[{SEPARATORS}]", cell))
    labels = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not labels:
        message = "no label; give images without any of the classes a separate class, such as none" if multi_label else "no label"
        raise LabelCellError(message, cell, "label")
    return labels


def _json_names(cell: str) -> tuple[str, ...] | None:
    """Entries of a JSON list; None for other cells."""
    try:
        entries = json.loads(cell)
    except json.JSONDecodeError:
        return None
    return tuple(map(str, entries)) if isinstance(entries, list) else None


def separator_notes(where: object, labels: Iterable[str]) -> Iterator[str]:
    """A note on class names that contain a separator, of a table that is read with one label per image."""
    several = sorted({label for label in labels if any(separator in label for separator in SEPARATORS)})
    if several:
        listing = some(several, 3)
        yield f"{where}: class names with ; or | ({listing}) are single classes. If they are several labels, pass --multi-label."
