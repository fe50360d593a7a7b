"""Errors and warnings about prompts."""

from __future__ import annotations

from veneer.injection.errors import VeneerError, VeneerWarning


class PromptError(VeneerError):
    """A prompt with more tokens (`given`) than the limit (`expected`); `where` is the part beyond it."""


class PromptWarning(VeneerWarning):
    """A truncated prompt, with the attributes of `PromptError`."""
