"""Description of a page of the app."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..context import Context


@dataclass(frozen=True)
class Page:
    """A page of the app.

    Args:
        name: label of its tab. `slug`: identifier in the interface. `about`: one sentence shown below the tab, or empty.
        build: creates the components inside the tab; the return value lets pages link to one another.
    """

    name: str
    slug: str
    about: str
    build: Callable[[Context], Any]
