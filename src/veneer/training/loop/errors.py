"""The error of training: a setting, parameter or loss that cannot work."""

from __future__ import annotations

from veneer.injection.errors import VeneerError


class TrainError(VeneerError):
    """A training setting, parameter or loss that cannot work."""
