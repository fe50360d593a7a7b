"""The same LoRA with veneer and with peft, on the same modules."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from torch import nn

from veneer.injection import attach

from .shapes import BenchError

WHERE = ("attn", "xattn")
"""Every attention projection, as a veneer selection."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Every attention projection, as peft's target modules: suffixes of module names."""

ABSENT = "peft is not installed, so nothing was compared with it. Install it with: pip install 'veneer[peft]'"


def has_peft() -> bool:
    """True if peft can be imported."""
    return importlib.util.find_spec("peft") is not None


def with_veneer(model: nn.Module, rank: int, at: tuple[str, ...] | None = None) -> nn.Module:
    """Attaches veneer's LoRA to a selection (default: every attention projection)."""
    attach(model, "lora", rank=rank, where=where(model) if at is None else at)
    return model


def where(model: nn.Module) -> tuple[str, ...]:
    """`WHERE`, without cross-attention if the model has none."""
    return WHERE if any(getattr(m, "is_cross_attention", False) for m in model.modules()) else WHERE[:1]


def with_peft(model: nn.Module, rank: int, at: list[str] | str | None = None, low_cpu_mem_usage: bool = False) -> nn.Module:
    """Injects peft's LoRA, with alpha and dropout of veneer's defaults.

    Args:
        at: peft's target modules (default: every attention projection).
    """
    options = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    return injected(model, "LoraConfig", targets(model) if at is None else at, low_cpu_mem_usage, **options)


def injected(model: nn.Module, kind: str, at: list[str] | str, low_cpu_mem_usage: bool = False, **options: Any) -> nn.Module:
    """Injects a peft method.

    Args:
        kind: name of the config class. `at`: target modules. `options`: other options of the config.
    """
    import peft

    config = getattr(peft, kind)(target_modules=at, **options)
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=low_cpu_mem_usage)
    return model


def targets(model: nn.Module) -> list[str]:
    """The `TARGETS` that the model has."""
    return [t for t in TARGETS if any(name.endswith(f".{t}") for name, _ in model.named_modules())]


def linears(model: nn.Module) -> str:
    """A regular expression of every linear layer for peft, with any number for the first number of a path."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return "|".join(dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(name), count=1) for name in names))


def trained(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Raises `BenchError` if the numbers of trainable parameters differ."""
    if trained(ours) != trained(theirs):
        raise BenchError(
            f"bench: veneer has {trained(ours):,} trainable parameters and peft {trained(theirs):,} on {type(ours).__name__}; "
            "expected the same number, because otherwise the times cannot be compared",
            where="targets",
            given=(trained(ours), trained(theirs)),
        )
