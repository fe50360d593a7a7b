"""accelerate on devices that it does not find by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator


@contextlib.contextmanager
def accelerator_on(device: str) -> Iterator[Accelerator]:
    """An accelerator on a device, such as the simulated one; later ones are on the CPU again."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = torch.device(device)
    try:
        yield accelerator
    finally:
        accelerator.state.device = torch.device("cpu")
