"""Memory of a device: free bytes of one of this machine, or a size such as `12GB`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from veneer.injection.errors import OptionError

UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(mb|gb|mib|gib)", re.IGNORECASE)
DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Capacity:
    """Memory for a run.

    Args:
        size: bytes. `device`: `cuda` or `cpu`, which decides the default dtype and whether encoders are offloaded.
    """

    size: int
    device: str


def parse_capacity(text: str) -> Capacity:
    """A size of a GPU's memory, `12GB` (12·10⁹ bytes) or `12GiB`, or the free memory of `cpu` or `cuda` of this machine.

    Raises:
        OptionError: neither a size above 0 nor a device of this machine.
    """
    if size := SIZE.fullmatch(text.strip()):
        count = round(float(size[1]) * UNITS[size[2].lower()])
        if count > 0:
            return Capacity(count, "cuda")
    if DEVICE.fullmatch(text) and (text == "cpu" or torch.cuda.is_available()):
        device = torch.device(text)
        return Capacity(free_memory(device) or 0, device.type)
    expected = ("12GB", "12GiB", "cpu", *(("cuda",) if torch.cuda.is_available() else ()))
    message = f"check: {text!r} is neither a size nor a device of this machine; expected one such as {', '.join(expected)}."
    raise OptionError(message, option="check", given=text, expected=expected)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the device besides the loaded weights; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "cpu":
        import psutil  # a dependency of accelerate

        return int(psutil.virtual_memory().available)
    return None
