"""A page of the app: its name, address, one-line description and builder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..context import Studio


@dataclass(frozen=True)
class Page:
    """A page of the app.

    Args:
        name: on its tab. `slug`: in its address. `about`: what one does there, in a sentence.
        build: makes its parts; called inside the tab. What it gives is for pages that lead to one another.
    """

    name: str
    slug: str
    about: str
    build: Callable[[Studio], Any]
