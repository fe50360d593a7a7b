"""Tiny real diffusers pipelines of every family: built from configs, no download, milliseconds per step.

Widths differ wherever possible, so that a swapped axis or a transposed weight raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .tokenizers import clip_tokenizer, t5_tokenizer

LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "duck", 3: "toy"}


def tiny_pipeline(family: str, seed: int = 0, **denoiser: Any) -> Any:
    """A tiny random pipeline of a family, in float32 on the CPU, in `eval` mode.

    Args:
        family: one of `FAMILIES`: `sd`, `sd2` (v-prediction), `sdxl`, `sd3`, `flux`, `pixart`, `dit`.
        seed: of the weights. The global random state is preserved.
        denoiser: entries that override the UNet's or transformer's config, such as `sample_size=128`.
    Returns:
        the diffusers pipeline; `save_pretrained` and `from_pretrained` work on it.
    Raises:
        ValueError: unknown family.

    >>> tiny_pipeline("sd").unet.config.cross_attention_dim
    24
    """
    if family not in FAMILIES:
        raise ValueError(f"tiny_pipeline: unknown family {family!r}; expected one of {', '.join(FAMILIES)}")
    return random_pipeline(lambda: FAMILIES[family](denoiser), seed)


def random_pipeline(build: Callable[[], Any], seed: int = 0) -> Any:
    """A pipeline with seeded weights, in `eval` mode and without progress bars; the global random state is preserved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = build()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipe


def tiny_vae(channels: int, blocks: tuple[int, ...] = (8, 12, 20), **config: Any) -> Any:
    """An `AutoencoderKL` with `channels` latent channels, and a block for each width of `blocks`."""
    from diffusers import AutoencoderKL

    n = len(blocks)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=8 * 2 ** (n - 1),
        **config,
    )


def tiny_clip(width: int, tokenizer: Any, projection: int | None = None, heads: int = 2) -> Any:
    """A CLIP text encoder for a tokenizer, with an optional projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width + 4,
        projection_dim=projection or width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tiny_t5(width: int, tokenizer: Any) -> Any:
    """A T5 text encoder of a width for a tokenizer."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=12, d_ff=56, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def _unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    base = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
    }
    return UNet2DConditionModel(**{**base, **config})


_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _sd(denoiser: dict[str, Any], pad: str = "<|endoftext|>", prediction: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer(pad=pad)
    return StableDiffusionPipeline(
        vae=tiny_vae(4),
        text_encoder=tiny_clip(24, tokenizer),
        tokenizer=tokenizer,
        unet=_unet(denoiser),
        scheduler=DDIMScheduler(**_SD_BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2(denoiser: dict[str, Any]) -> Any:
    return _sd({"use_linear_projection": True, "attention_head_dim": (2, 4), **denoiser}, "!", "v_prediction")


def _sdxl(denoiser: dict[str, Any]) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    config = {
        "cross_attention_dim": 24 + 28,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    }
    return StableDiffusionXLPipeline(
        vae=tiny_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=tiny_clip(24, first),
        text_encoder_2=tiny_clip(28, second, projection=20),
        tokenizer=first,
        tokenizer_2=second,
        unet=_unet({**config, **denoiser}),
        scheduler=DDIMScheduler(**_SD_BETAS, clip_sample=False, set_alpha_to_one=False),
        add_watermarker=False,
    )


def _sd3(denoiser: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    first, second, third = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "caption_projection_dim": 36,
        "joint_attention_dim": 60,
        "pooled_projection_dim": 20 + 14,
        "pos_embed_max_size": 24,
    }
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**config, **denoiser}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_clip(24, first, projection=20),
        tokenizer=first,
        text_encoder_2=tiny_clip(28, second, projection=14),
        tokenizer_2=second,
        text_encoder_3=tiny_t5(60, third),
        tokenizer_3=third,
    )


def _flux(denoiser: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    first, second = clip_tokenizer(), t5_tokenizer()
    config = {
        "in_channels": 6 * 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 60,
        "pooled_projection_dim": 28,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(6, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_clip(28, first),
        tokenizer=first,
        text_encoder_2=tiny_t5(60, second),
        tokenizer_2=second,
        transformer=FluxTransformer2DModel(**{**config, **denoiser}),
    )


def _pixart(denoiser: dict[str, Any]) -> Any:
    """PixArt-alpha for 256 pixels: the smallest size that the pipeline accepts with its default settings."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer = t5_tokenizer()
    config = {
        "sample_size": 32,
        "patch_size": 4,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "cross_attention_dim": 24,
        "caption_channels": 60,
        "norm_num_groups": 4,
    }
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(60, tokenizer),
        vae=tiny_vae(4, (4, 4, 8, 12)),
        transformer=PixArtTransformer2DModel(**{**config, **denoiser}),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def _dit(denoiser: dict[str, Any]) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "norm_num_groups": 4,
        "num_embeds_ada_norm": 1000,
    }
    pipe: Any = DiTPipeline(
        transformer=DiTTransformer2DModel(**{**config, **denoiser}),
        vae=tiny_vae(4),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label=LABELS,
    )
    pipe.register_to_config(id2label=LABELS)  # otherwise saving loses the names
    return pipe


FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sd": _sd,
    "sd2": _sd2,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "dit": _dit,
}
