"""Encoders of a pipeline on the CPU while only its denoiser is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

FORMER_DEVICE = "_veneer_former_device"
"""Attribute of an offloaded module: the device from which it was moved."""


def offload_encoders(modules: Iterable[nn.Module]) -> None:
    """Moves the modules to the CPU."""
    for module in modules:
        vars(module)[FORMER_DEVICE] = next(module.parameters()).device
        module.to("cpu")


@contextlib.contextmanager
def restore_encoders(pipe: Any) -> Iterator[None]:
    """Context with the offloaded modules of a pipeline on their former device. Other modules are not touched."""
    modules = offloaded_modules(pipe)
    try:
        for module in modules:
            module.to(vars(module)[FORMER_DEVICE])
        yield
    finally:
        for module in modules:
            module.to("cpu")


def offloaded_modules(pipe: Any) -> list[nn.Module]:
    """The modules of a pipeline that `offload_encoders` has moved."""
    return [part for part in pipe.components.values() if isinstance(part, nn.Module) and FORMER_DEVICE in vars(part)]
