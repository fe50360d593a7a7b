"""The error of captioning models."""

from veneer.injection.errors import VeneerError


class CaptionError(VeneerError):
    """A captioning model that cannot be loaded; `where` is the part that is missing or not supported."""
