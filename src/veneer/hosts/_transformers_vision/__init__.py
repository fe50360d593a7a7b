"""Vision models of transformers as records: one module per family."""

from __future__ import annotations

from .._records import load_records
from .vision_record import VisionRecord


def records() -> dict[str, VisionRecord]:
    """The record of every family, by the name of its module. Imports no library of models."""
    return load_records(__name__)
