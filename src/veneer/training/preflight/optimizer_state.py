"""Bytes of optimizer state, for estimates of memory and disk space."""

from __future__ import annotations

import functools

import torch
from torch import nn

from veneer.injection.errors import VeneerError

from ..loop.optimizers import build, pack, start_training

STATES: dict[str, float] = {"adamw": 8, "adamw8bit": 2, "sgd": 4, "prodigy": 16, "adafactor": 0.5}
"""Bytes per float32 parameter (Prodigy: two moments, s and initial value; Adafactor: approximate)."""
SIDE = 128


@functools.cache
def state_bytes(optimizer: str) -> float:
    """Bytes of state per float32 parameter: those in `STATES`, else measured after a step of a matrix with 128 rows and columns.

    8, as Adam's, if the optimizer is not installed or needs another device than the CPU.
    """
    if optimizer in STATES:
        return STATES[optimizer]
    parameter = nn.Parameter(torch.ones(SIDE, SIDE))
    try:
        instance = build(optimizer, [{"params": [parameter]}], 1e-3)
    except VeneerError:
        return STATES["adamw"]
    start_training(instance)
    parameter.grad = torch.ones_like(parameter)
    with torch.random.fork_rng(devices=[]):
        instance.step()
    tensors, _ = pack(instance, {"parameter": parameter})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / parameter.numel()
