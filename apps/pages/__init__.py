"""One file a page. A page is a function that builds it, and its name and a line about it."""

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


def pages() -> list[Page]:
    """All pages, in the order of their tabs."""
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
