"""Pages of the app: one package per page, with a function that builds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..context import Context


@dataclass(frozen=True)
class Page:
    """A page of the app.

    Args:
        name: label of its tab. `slug`: identifier in the interface. `about`: one sentence shown below the tab.
        build: creates the components inside the tab; the return value lets pages link to one another.
    """

    name: str
    slug: str
    about: str
    build: Callable[[Context], Any]


def pages() -> list[Page]:
    """All pages, in tab order."""
    from .adapters import adapters_page
    from .classify import classify_page
    from .control import control_page
    from .generate import generate_page
    from .methods import methods_page
    from .personalize import personalize_page

    return [
        personalize_page.PAGE,
        generate_page.PAGE,
        control_page.PAGE,
        classify_page.PAGE,
        adapters_page.PAGE,
        methods_page.PAGE,
    ]
