"""Captions of images by captioning models and taggers."""

from .errors import CaptionError
from .models import Captioner, open_captioner

__all__ = ["CaptionError", "Captioner", "open_captioner"]
