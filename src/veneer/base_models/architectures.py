"""Architectures of published diffusion models, built on the meta device: names and shapes without weights or a download.

They are enough for commands that only read and write adapter files, such as `veneer convert lora.safetensors --to comfyui`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from veneer.extras import require
from veneer.injection.errors import UnknownName

from .clip_vocabulary import DeferredTokenizer, clip_tokenizer, has_vocabulary
from .skeletons.meta_modules import meta_modules
from .skeletons.transformer_configs import CHROMA, TRANSFORMERS

Config = Mapping[str, Any]

SD15: Config = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD21: Config = {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 96, "use_linear_projection": True,
    "upcast_attention": True,
}  # fmt: skip
SDXL: Config = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD3: Config = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
SD35_MEDIUM: Config = {
    **SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
SD35_LARGE: Config = {
    **SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
}  # fmt: skip
FLUX: Config = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
PIXART: Config = {
    "sample_size": 128, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "num_layers": 28, "cross_attention_dim": 1152, "patch_size": 2, "caption_channels": 4096, "norm_type": "ada_norm_single",
}  # fmt: skip
DIT: Config = {
    "sample_size": 32, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
CLIP_L: Config = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu", "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 1,
}  # fmt: skip
CLIP_H: Config = {
    **CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
CLIP_BIGG: Config = {
    **CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL: Config = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip

VAE: Config = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
VAE_16: Config = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

UNET, CLIP, CLIP_PROJECTED, T5 = "UNet2DConditionModel", "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
ARCHITECTURES: dict[str, dict[str, tuple[str, Config]]] = {
    "sd15": {"unet": (UNET, SD15), "text_encoder": (CLIP, CLIP_L)},
    "sd21": {"unet": (UNET, SD21), "text_encoder": (CLIP, CLIP_H)},
    "sdxl": {"unet": (UNET, SDXL), "text_encoder": (CLIP, CLIP_L), "text_encoder_2": (CLIP_PROJECTED, CLIP_BIGG)},
    **{
        name: {
            "transformer": ("SD3Transformer2DModel", config), "text_encoder": (CLIP_PROJECTED, CLIP_L),
            "text_encoder_2": (CLIP_PROJECTED, CLIP_BIGG), "text_encoder_3": (T5, T5_XXL),
        }
        for name, config in (("sd3", SD3), ("sd35", SD35_MEDIUM), ("sd35-large", SD35_LARGE))
    },
    "flux": {
        "transformer": ("FluxTransformer2DModel", FLUX), "text_encoder": (CLIP, CLIP_L), "text_encoder_2": (T5, T5_XXL),
    },
    "pixart": {"transformer": ("PixArtTransformer2DModel", PIXART), "text_encoder": (T5, T5_XXL)},
    "dit": {"transformer": ("DiTTransformer2DModel", DIT)},
    "chroma": {"transformer": CHROMA, "text_encoder": (T5, T5_XXL)},
    **{name: {"transformer": transformer} for name, transformer in TRANSFORMERS.items()},
}  # fmt: skip
"""Name to the denoiser and the text encoders of its pipeline that take adapters: component to class and config."""
PIPELINES: dict[str, tuple[str, Config]] = {
    "sd15": ("StableDiffusionPipeline", VAE),
    "sd21": ("StableDiffusionPipeline", VAE),
    "sdxl": ("StableDiffusionXLPipeline", {**VAE, "force_upcast": True}),
    **dict.fromkeys(("sd3", "sd35", "sd35-large"), ("StableDiffusion3Pipeline", VAE_16)),
    "flux": ("FluxPipeline", VAE_16),
    "pixart": ("PixArtAlphaPipeline", VAE),
    "dit": ("DiTPipeline", VAE),
}
"""Name to the class of its pipeline and the config of its VAE, for the architectures that `veneer personalize` trains."""


def architecture(name: str) -> Any:
    """The denoiser and text encoders of a published model on the meta device, as components of a pipeline.

    Adapter files load on it, with their tensors on the CPU; it cannot run. Needs neither diffusers nor transformers, except for
    tokens of textual inversion.

    Args:
        name: one of `ARCHITECTURES`: `sd15`, `sd21`, `sdxl`, `sd3`, `sd35` (medium), `sd35-large`, `flux`, `pixart`, `dit`,
            `chroma`, `flux2`, `flux2-klein-4b`, `flux2-klein-9b`, `z-image`, `qwen-image`, `lumina2`, `wan-1.3b`, `wan-5b`,
            `wan-14b`, `wan-14b-i2v`, `hunyuan-video`, `krea-2`, `sana`.
    Raises:
        UnknownName: no such architecture.
    """
    _check_name(name)
    tokenizers = {part: DeferredTokenizer() for part in _tokenizers(name) if has_vocabulary()}
    return SimpleNamespace(components={**meta_modules(name), **tokenizers})


def library_architecture(name: str) -> Any:
    """The components of `architecture(name)` as diffusers and transformers build them: on the meta device, with a forward pass.

    Raises:
        UnknownName: no such architecture. MissingExtra: diffusers is not installed.
    """
    _check_name(name)
    require("diffusers", "transformers")
    with torch.device("meta"):
        parts = {part: _build(*entry) for part, entry in ARCHITECTURES[name].items()}
    tokenizer = clip_tokenizer()
    tokenizers = {part: copy.deepcopy(tokenizer) for part in _tokenizers(name) if tokenizer is not None}
    return SimpleNamespace(components={**parts, **tokenizers})


def autoencoder(name: str) -> Any:
    """The VAE of a published model on the meta device.

    Args:
        name: one of `PIPELINES`.
    """
    with torch.device("meta"):
        return _build("AutoencoderKL", PIPELINES[name][1])


def _tokenizers(name: str) -> list[str]:
    """Components with a tokenizer of CLIP."""
    texts = [part for part, (kind, _) in ARCHITECTURES[name].items() if kind in (CLIP, CLIP_PROJECTED)]
    return [part.replace("text_encoder", "tokenizer") for part in texts]


def _check_name(name: str) -> None:
    if name not in ARCHITECTURES:
        known = tuple(ARCHITECTURES)
        message = f"architecture: no {name!r}; expected one of {', '.join(known)}."
        raise UnknownName(message, name, "architecture", expected=known)


def _build(kind: str, config: Config) -> Any:
    import diffusers
    import transformers

    if kind in (CLIP, CLIP_PROJECTED, T5):
        settings = transformers.T5Config if kind == T5 else transformers.CLIPTextConfig
        return getattr(transformers, kind)(settings(**config))
    return getattr(diffusers, kind)(**config)
