"""Well-known models at full size on the meta device: names and shapes without weights or downloads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from veneer.injection.errors import UnknownName

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
DIT_XL_2: dict[str, Any] = {
    "sample_size": 32, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
CLIP_BIGG: dict[str, Any] = {
    **CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip


def _bundled() -> Any:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from veneer import base_models

    folder = base_models.path("bundled")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    return _pipeline(unet=unet, text_encoder=text, tokenizer=_tokenizer())


def _stable_diffusion(unet: Mapping[str, Any], *encoders: Mapping[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        texts = [kind(CLIPTextConfig(**config)) for kind, config in zip(kinds, encoders, strict=False)]
        components = {f"text_encoder{f'_{n}' if n > 1 else ''}": text for n, text in enumerate(texts, 1)}
        tokenizers = {name.replace("text_encoder", "tokenizer"): _tokenizer() for name in components}
        return _pipeline(unet=UNet2DConditionModel(**unet), **components, **tokenizers)

    return build


def _diffusion_transformer(kind: str, config: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, kind)(**config)
        return model

    return build


def _timm(architecture: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(architecture, pretrained=False)
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
    "Stable Diffusion 1.5": _stable_diffusion(SD15, CLIP_L),
    "Stable Diffusion XL": _stable_diffusion(SDXL, CLIP_L, CLIP_BIGG),
    "DiT-XL/2": _diffusion_transformer("DiTTransformer2DModel", DIT_XL_2),
    "FLUX.1 dev": _diffusion_transformer("FluxTransformer2DModel", {"guidance_embeds": True}),
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
