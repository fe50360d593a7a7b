"""Device and dtype selection for base models."""

from __future__ import annotations

from typing import Any, Literal

from veneer.injection.errors import BaseModelError

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["no", "bf16", "fp16"]
"""Dtype of autocast; `no` is float32."""


def resolve_device(name: str | None = None) -> str:
    """The device of a name; by default a GPU if there is one, else the CPU.

    Raises:
        BaseModelError: the device does not exist, or this build of torch does not support it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpu = torch.accelerator.current_accelerator(check_available=True)
        known = ("cpu", *([gpu.type] if gpu is not None else []))
        message = f"--device {name} is not available; expected one of {', '.join(known)}."
        raise BaseModelError(message, where="device", given=name, expected=known) from error
    return name


def resolve_dtype(name: Dtype | None, device: Any) -> Any:
    """The torch dtype of a frozen base model: `name`, or by default bfloat16 on an accelerator and float32 on the CPU.

    Adapters are in float32 in any case, and their inputs and outputs are cast.

    Args:
        device: a device or its name.
    """
    import torch

    return getattr(torch, name or ("float32" if torch.device(device).type == "cpu" else "bfloat16"))
