"""Weight names in kohya's format: dots become underscores, and some models use the names of their original release."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.injection.sites import WeightSite
from veneer.injection.towers import Tower

from .._core.lora_config import ENCODERS
from .modules import T5, OriginalModule, diffusers_modules, original_modules, sliced_modules
from .transformers import names_of


@dataclass(frozen=True)
class NamedLayer:
    """One module of the format.

    Args:
        names: its spellings, without a suffix such as `.alpha`; the first one is written.
        sites: the weights that make up its output rows, in order; one for most modules, several for a fused projection.
        swapped: the halves of the rows are swapped (scale and shift of an adaptive norm before the last layer).
    """

    names: tuple[str, ...]
    sites: tuple[WeightSite, ...]
    swapped: bool = False


def named_layers(tower: Tower, numbered: bool = False) -> list[NamedLayer]:
    """Every module of a tower that the format can hold; empty for models that no tool writes in it.

    Args:
        numbered: writes the first of several text encoders as `lora_te1` instead of `lora_te`.
    """
    kind, model = type(tower.module).__name__, tower.module
    found, record = original_modules(tower), names_of(model)
    if hasattr(model, "down_blocks"):
        first = base_model_version(model) == "sdxl_base_v1-0"
        return [NamedLayer(_kohya_names(("lora_unet",), _unet_spellings(m, first)), m.sites) for m in found]
    if kind in ENCODERS or kind == T5:
        return [NamedLayer(_kohya_names(_encoder_prefixes(tower, numbered), (m.path,)), m.sites) for m in found]
    if record is None or record.network_module is None:
        return []
    return [_unet_layer(module) for module in (*sliced_modules(tower), *found)]


def readable_layers(tower: Tower) -> list[NamedLayer]:
    """Every module of a tower under all names that are read: for a transformer also under its path in diffusers."""
    layers = named_layers(tower)
    if names_of(tower.module) is not None and not layers:  # OneTrainer writes families that kohya's trainers do not support
        layers = [_unet_layer(module) for module in original_modules(tower)]
    return [*(_unet_layer(module) for module in diffusers_modules(tower)), *layers]


def base_model_version(model: nn.Module) -> str | None:
    """sd-scripts' name of a denoiser's base model: `sd_v1`, `sd_v2`, `sdxl_base_v1-0` or `flux1`; None if unknown."""
    config: Any = getattr(model, "config", {})
    if (record := names_of(model)) is not None:
        return record.version
    if not hasattr(model, "down_blocks"):
        return None
    if config.get("addition_embed_type") == "text_time":
        return "sdxl_base_v1-0"
    return "sd_v2" if config.get("use_linear_projection") else "sd_v1"


def _unet_layer(module: OriginalModule) -> NamedLayer:
    names = _kohya_names(("lora_unet",), (module.path, *module.spellings))
    return NamedLayer(tuple(dict.fromkeys(names)), module.sites, module.swapped)


def _unet_spellings(module: OriginalModule, first: bool) -> tuple[str, ...]:
    """diffusers' spelling and that of the original release, the written one first."""
    spellings = dict.fromkeys((module.path, module.own or module.path) if first else (module.own or module.path, module.path))
    return tuple(spellings)


def _kohya_names(prefixes: tuple[str, ...], paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}_{path.replace('.', '_')}" for path in paths for prefix in prefixes)


def _encoder_prefixes(tower: Tower, numbered: bool) -> tuple[str, ...]:
    """`lora_te` for a model with one text encoder, else numbered. FLUX's T5 is number 3 in sd-scripts, number 2 elsewhere."""
    component = tower.component or ENCODERS.get(type(tower.module).__name__, "")
    if type(tower.module).__name__ == T5:
        return ("lora_te3", "lora_te2") if component == "text_encoder_2" else ("lora_te3",)
    if component == "text_encoder":
        return ("lora_te1", "lora_te") if numbered else ("lora_te", "lora_te1")
    return (f"lora_te{component.rpartition('_')[2]}",)
