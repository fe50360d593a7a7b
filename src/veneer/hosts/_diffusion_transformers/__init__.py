"""Diffusion transformers of diffusers as records: one module per family, for images and for video."""

from __future__ import annotations

from .._records import load_records
from .record import TransformerRecord


def records() -> dict[str, TransformerRecord]:
    """The record of every family, by the name of its module. Imports no library of models."""
    return load_records(__name__)
