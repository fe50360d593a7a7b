"""Teach a subject or a style from a few photos."""

from __future__ import annotations

from ..studio import Studio
from . import Page


def build(studio: Studio) -> None:
    """The page."""


PAGE = Page("Teach", "teach", "Teach a base a subject or a style from a few photos.", build)
