"""Errors and warnings about prompts."""

from __future__ import annotations

from veneer.injection.errors import VeneerError, VeneerWarning


class PromptError(VeneerError):
    """A prompt with more tokens (`given`) than a text encoder takes (`expected`); `where` is the part that is lost."""


class PromptWarning(VeneerWarning):
    """A prompt that is cut off, with the attributes of `PromptError`."""
