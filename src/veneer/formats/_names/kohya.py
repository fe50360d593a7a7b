"""How kohya's layout names weights: dots become underscores, and some models are named as in their first release."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower

from .._core.lora_config import ENCODERS
from .modules import T5, Module, modules

WRITTEN = ("FluxTransformer2DModel", "SD3Transformer2DModel")  # transformers that sd-scripts train


@dataclass(frozen=True)
class Place:
    """One module of the layout.

    Args:
        names: its spellings, without a part such as `.alpha`; the first is the one that is written.
        sites: the weights that its output rows are, in order; one for most, several for a fused projection.
        swapped: the halves of the rows are the other way round (scale and shift of an adaptive norm before the last layer).
    """

    names: tuple[str, ...]
    sites: tuple[WeightSite, ...]
    swapped: bool = False


def places(tower: Tower, numbered: bool = False) -> list[Place]:
    """Every place that the layout has for a tower; none where no tool writes it for such a model.

    Args:
        numbered: the first text encoder is written as `lora_te1`, one of several, and not as `lora_te`.
    """
    kind, model = type(tower.module).__name__, tower.module
    found = modules(tower)
    if hasattr(model, "down_blocks"):
        first = version(model) == "sdxl_base_v1-0"
        return [Place(_spelt(("lora_unet",), _both(m, first)), m.sites) for m in found]
    if kind in ENCODERS or kind == T5:
        return [Place(_spelt(_encoder(tower, numbered), (m.path,)), m.sites) for m in found]
    return [Place(_spelt(("lora_unet",), (m.path,)), m.sites, m.swapped) for m in found if kind in WRITTEN]


def version(model: nn.Module) -> str | None:
    """What sd-scripts call the base of a denoiser: `sd_v1`, `sd_v2`, `sdxl_base_v1-0` or `flux1`; None for other models."""
    config: Any = getattr(model, "config", {})
    if type(model).__name__ == "FluxTransformer2DModel":
        return "flux1"
    if not hasattr(model, "down_blocks"):
        return None
    if config.get("addition_embed_type") == "text_time":
        return "sdxl_base_v1-0"
    return "sd_v2" if config.get("use_linear_projection") else "sd_v1"


def _both(module: Module, first: bool) -> tuple[str, ...]:
    """diffusers' spelling and that of the first release, the written one first."""
    spelt = dict.fromkeys((module.path, module.own or module.path) if first else (module.own or module.path, module.path))
    return tuple(spelt)


def _spelt(prefixes: tuple[str, ...], paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}_{path.replace('.', '_')}" for path in paths for prefix in prefixes)


def _encoder(tower: Tower, numbered: bool) -> tuple[str, ...]:
    """`lora_te` of a model with one text encoder, else numbered. FLUX's T5 is the third for sd-scripts, the second for others."""
    component = tower.component or ENCODERS.get(type(tower.module).__name__, "")
    if type(tower.module).__name__ == T5:
        return ("lora_te3", "lora_te2") if component == "text_encoder_2" else ("lora_te3",)
    if component == "text_encoder":
        return ("lora_te1", "lora_te") if numbered else ("lora_te", "lora_te1")
    return (f"lora_te{component.rpartition('_')[2]}",)
