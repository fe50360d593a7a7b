"""Well-known models at full size on the meta device: names and shapes without weights or downloads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from veneer.base_models.architectures import library_architecture
from veneer.injection.errors import UnknownName


def _bundled() -> Any:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from veneer import base_models

    folder = base_models.path("bundled")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    return _pipeline(unet=unet, text_encoder=text, tokenizer=_tokenizer())


def _stable_diffusion(name: str) -> Callable[[], Any]:
    def build() -> Any:
        parts = library_architecture(name).components
        texts = [part for part in parts if part.startswith("text_encoder")]
        return _pipeline(**{part.replace("text_encoder", "tokenizer"): _tokenizer() for part in texts} | parts)

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False)
        return model

    return build


def _clip() -> nn.Module:
    import open_clip

    from veneer.models.clip_classifier import CLIPClassifier

    clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    with torch.device("cpu"):
        return CLIPClassifier(clip, open_clip.get_tokenizer("ViT-B-16"), [f"class {i}" for i in range(1000)])


def _tokenizer() -> Any:
    """The bundled base model's tokenizer. Methods that train token embeddings need one, but counts do not depend on it."""
    from transformers import CLIPTokenizer

    from veneer import base_models

    return CLIPTokenizer.from_pretrained(base_models.path("bundled") / "tokenizer")


def _pipeline(**components: Any) -> Any:
    """An object that `attach` accepts as a pipeline."""
    return SimpleNamespace(components=components)


MODELS: dict[str, Callable[[], Any]] = {
    "bundled base": _bundled,
    "Stable Diffusion 1.5": _stable_diffusion("sd15"),
    "Stable Diffusion XL": _stable_diffusion("sdxl"),
    "DiT-XL/2": lambda: library_architecture("dit").components["transformer"],
    "FLUX.1 dev": lambda: library_architecture("flux").components["transformer"],
    "ViT-B/16": _timm("vit_base_patch16_224"),
    "Swin-B": _timm("swin_base_patch4_window7_224"),
    "ConvNeXt-B": _timm("convnext_base"),
    "ResNet-50": _timm("resnet50"),
    "CLIP ViT-B/16, 1,000 classes": _clip,
}


@functools.lru_cache(maxsize=len(MODELS))
def full_size(name: str) -> Any:
    """A model of `MODELS`, or for diffusion models the denoiser and its text encoders as a pipeline. Cached.

    Raises:
        UnknownName: no model has this name.
    """
    if name not in MODELS:
        raise UnknownName(f"full_size: no {name!r}; there are: {', '.join(MODELS)}.", name, "model", expected=tuple(MODELS))
    with torch.device("meta"):
        return MODELS[name]()
