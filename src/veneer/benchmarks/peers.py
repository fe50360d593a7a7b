"""The same LoRA by veneer and by peft, on the same modules."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from torch import nn

from veneer.injection import attach

from .shapes import BenchError

WHERE = ("attn", "xattn")
"""Every attention projection, in veneer's words."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same in peft's: endings of module names."""

ABSENT = "peft is not installed, so nothing was compared with it. Install it with: pip install 'veneer[peft]'"


def has_peft() -> bool:
    """True if peft can be imported."""
    return importlib.util.find_spec("peft") is not None


def with_veneer(model: nn.Module, rank: int, at: tuple[str, ...] | None = None) -> nn.Module:
    """The model, with veneer's LoRA at a selection; None for every attention projection that it has."""
    attach(model, "lora", rank=rank, where=where(model) if at is None else at)
    return model


def where(model: nn.Module) -> tuple[str, ...]:
    """`WHERE`, without cross-attention where the model has none."""
    return WHERE if any(getattr(m, "is_cross_attention", False) for m in model.modules()) else WHERE[:1]


def with_peft(model: nn.Module, rank: int, at: list[str] | str | None = None, low_cpu_mem_usage: bool = False) -> nn.Module:
    """The model, with peft's LoRA, alpha and dropout as veneer's defaults.

    Args:
        at: names in peft's words; None for every attention projection.
    """
    options = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    return injected(model, "LoraConfig", targets(model) if at is None else at, low_cpu_mem_usage, **options)


def injected(model: nn.Module, kind: str, at: list[str] | str, low_cpu_mem_usage: bool = False, **options: Any) -> nn.Module:
    """The model, with what peft puts there for a config.

    Args:
        kind: name of the config's class. `options`: its options, beside the names `at` which it is put.
    """
    import peft

    config = getattr(peft, kind)(target_modules=at, **options)
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=low_cpu_mem_usage)
    return model


def targets(model: nn.Module) -> list[str]:
    """Those of `TARGETS` that the model has."""
    return [t for t in TARGETS if any(name.endswith(f".{t}") for name, _ in model.named_modules())]


def linears(model: nn.Module) -> str:
    """Every linear layer in peft's words: one pattern, with any number for the first in a path."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return "|".join(dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(name), count=1) for name in names))


def trained(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Raise `BenchError` if the two do not train as many numbers, so that no ratio compares unlike things."""
    if trained(ours) != trained(theirs):
        raise BenchError(
            f"bench: veneer trains {trained(ours):,} numbers and peft {trained(theirs):,} on {type(ours).__name__}; the targets "
            "are not the same, so the times cannot be compared",
            where="targets",
            given=(trained(ours), trained(theirs)),
        )
