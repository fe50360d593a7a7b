"""The feature model of a run that names none: the bundled CLIP for the bundled base model, else a model in the local cache."""

from __future__ import annotations

from pathlib import Path

from veneer.base_models import BUNDLED, current_name

OFF = "none"
"""Name of no feature model: nothing is measured."""
CACHED: dict[str, str] = {
    "transformers:openai/clip-vit-large-patch14": "openai/clip-vit-large-patch14",
    "transformers:openai/clip-vit-base-patch16": "openai/clip-vit-base-patch16",
    "transformers:openai/clip-vit-base-patch32": "openai/clip-vit-base-patch32",
    "timm:vit_base_patch14_dinov2.lvd142m": "timm/vit_base_patch14_dinov2.lvd142m",
    "timm:vit_small_patch14_dinov2.lvd142m": "timm/vit_small_patch14_dinov2.lvd142m",
}
"""Feature models that are used if they are in the local cache of the hub, with their repositories, the preferred first: CLIP
compares with prompts too, which DINOv2 cannot."""
WEIGHTS = "model.safetensors"
"""File of the weights in these repositories."""


def default_features(base: str | Path) -> str:
    """Name of the feature model for a base model: `bundled`, one of `CACHED`, or `none`.

    The bundled CLIP knows what the bundled base model generates; images of other base models it would judge wrongly.
    """
    if current_name(str(base)) in BUNDLED:
        return "bundled"
    return next((name for name, repository in CACHED.items() if _is_cached(repository)), OFF)


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, WEIGHTS), str)
