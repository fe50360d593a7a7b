"""Adapters whose parameters differ from their initialization."""

from __future__ import annotations

from typing import Any

import veneer
from tests.methods.controls import stir


def perturbed(pipe: Any, method: str, size: float = 0.3, seed: int = 0, **options: Any) -> veneer.Attachment:
    """Attaches a method and adds fixed random values, of standard deviation `size`, to its parameters."""
    attached = veneer.attach(pipe, method, **options)
    for number, (_, adapter) in enumerate(attached.parts.values()):
        stir(adapter, seed + number, size)
    return attached
