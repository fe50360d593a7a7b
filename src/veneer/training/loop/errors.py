"""Errors of the training loop."""

from __future__ import annotations

from veneer.injection.errors import VeneerError


class TrainError(VeneerError):
    """An invalid training setting, parameter or loss."""
