"""Diffusion transformers as records: one module per family of diffusers, and the records of other packages."""

from __future__ import annotations

from .._records.record_registry import RecordRegistry
from .record import TransformerRecord

REGISTRY = RecordRegistry(TransformerRecord, __name__, "veneer.transformer_records")


def records() -> dict[str, TransformerRecord]:
    """The record of every family, by the name of its module or entry point. Imports no library of models."""
    return REGISTRY.records()
