"""The base model in training: frozen, and with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from veneer.injection import Attachment
from veneer.injection.errors import OptionError


def freeze(pipe: Any) -> None:
    """Sets every component of a pipeline to `eval` and disables its gradients; adapters are attached afterwards."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def enable_gradient_checkpointing(tower: Any) -> None:
    """Enables gradient checkpointing: activations are recomputed in the backward pass, which saves memory.

    Raises:
        OptionError: the model does not support it.
    """
    enable = getattr(tower, "enable_gradient_checkpointing", None) or getattr(tower, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(tower, "_supports_gradient_checkpointing", True):
        kind = type(tower).__name__
        message = f"{kind} has no gradient checkpointing. Leave out --gradient-checkpointing."
        raise OptionError(message, option="gradient_checkpointing", given=kind)
    if hasattr(tower, "enable_gradient_checkpointing"):
        enable(_recompute)
    else:
        enable()
    tower.training = True  # only the flag that enables checkpointing; submodules stay in eval, without dropout


def _recompute(block: Any, *inputs: Any, **options: Any) -> Any:
    """A block whose activations are recomputed; with keyword arguments, which the default of diffusers has not."""
    return checkpoint(block, *inputs, use_reentrant=False, **options)


def checkpoint_towers(pipe: Any, attached: Sequence[Attachment]) -> None:
    """`enable_gradient_checkpointing` on the components of a pipeline that have adapters."""
    for component in {component for attachment in attached for component in attachment.towers}:
        enable_gradient_checkpointing(pipe.components[component])
