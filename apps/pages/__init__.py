"""Pages of the app: one package per page."""

from __future__ import annotations

from .adapters import adapters_page
from .classify import classify_page
from .control import control_page
from .gallery import gallery_page
from .generate import generate_page
from .methods import methods_page
from .page import Page
from .personalize import personalize_page


def pages() -> list[Page]:
    """All pages, in tab order."""
    return [
        personalize_page.PAGE,
        generate_page.PAGE,
        gallery_page.PAGE,
        control_page.PAGE,
        classify_page.PAGE,
        adapters_page.PAGE,
        methods_page.PAGE,
    ]
