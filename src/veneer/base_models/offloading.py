"""Offloading of a pipeline for generation: weights are on the CPU, and on the accelerator only while they are used."""

from __future__ import annotations

from typing import Any, Literal, get_args

from veneer.injection.errors import OptionError

Offload = Literal["none", "model", "group"]


def check_offload(kind: str, device: Any, quantized: bool = False) -> None:
    """Checks an offloading kind.

    Args:
        device: the device that generates. `quantized`: whether layers of the base model are quantized.
    Raises:
        OptionError: an unknown kind, or the device is the CPU, or `group` with quantized layers, which have more tensors than
            those that are copied.
    """
    import torch

    kinds = get_args(Offload)
    if kind not in kinds:
        message = f"offload is {kind!r}; expected one of {', '.join(kinds)}."
        raise OptionError(message, option="offload", given=kind, expected=kinds)
    if kind != "none" and torch.device(device).type == "cpu":
        message = f"--offload {kind} needs an accelerator, but the device is the CPU; expected none, or another --device."
        raise OptionError(message, option="offload", given=kind, expected=("none",))
    if kind == "group" and quantized:
        message = "--offload group does not work with --quantize; expected --offload model, or no quantization."
        raise OptionError(message, option="offload", given=kind, expected=("none", "model"))


def offload_pipeline(pipe: Any, kind: Offload, device: Any) -> None:
    """Lets a pipeline on the CPU generate on an accelerator with only a part of its weights there at a time, adapters included.

    By diffusers: with `model` one component is on the device (`enable_model_cpu_offload`), with `group` one block of each
    component (`enable_group_offload`), and on CUDA the next block is copied while this one computes. Images equal those without
    offloading. For generation only: the backward pass would need blocks that have left the device.

    Args:
        pipe: on the CPU, with its adapters attached.
        device: the accelerator.
    Raises:
        OptionError: see `check_offload`.
    """
    import torch

    check_offload(kind, device)
    target = torch.device(device)
    if kind == "model":
        pipe.enable_model_cpu_offload(device=target)
    elif kind == "group":
        pipe.enable_group_offload(
            onload_device=target,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=target.type == "cuda",
        )
