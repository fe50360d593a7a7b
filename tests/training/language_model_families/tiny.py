"""Tiny real pipelines whose text encoder is a language model: Z-Image, Qwen-Image and Lumina 2. Widths differ where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from veneer.testing.pipelines import random_pipeline, tiny_vae
from veneer.testing.tokenizers import gemma_tokenizer, qwen_tokenizer

QWEN = (
    "system Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background user assistant"
)
LUMINA = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on "
    "textual prompts or user prompts. <Prompt Start>"
)


def _language_model(tokenizer: Any, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 28, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip


def _z_image(shift: dict[str, Any]) -> Any:
    tokenizer = qwen_tokenizer("user assistant")
    text = transformers.Qwen3Config(**_language_model(tokenizer, 20), head_dim=8)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **shift}),
        vae=tiny_vae(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=20,
            axes_dims=[4, 2, 2], axes_lens=[640, 64, 64],
        ),
    )  # fmt: skip


def _qwen_image(shift: dict[str, Any]) -> Any:
    tokenizer = qwen_tokenizer(QWEN)
    text = {**_language_model(tokenizer, 24), "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    rates = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **rates, **shift}),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3], latents_std=[2.0, 0.5, 1.5],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=12, out_channels=3, joint_attention_dim=24,
            axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip


def _lumina2(shift: dict[str, Any]) -> Any:
    tokenizer = gemma_tokenizer(LUMINA)
    text = transformers.Gemma2Config(**_language_model(tokenizer, 20), head_dim=8, query_pre_attn_scalar=8, sliding_window=64)
    return diffusers.Lumina2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **shift}),
        vae=tiny_vae(
            4, (4, 4, 8, 12), scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=transformers.Gemma2Model(text),
        tokenizer=tokenizer,
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
            num_kv_heads=2, multiple_of=4, axes_dim_rope=(2, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=20,
        ),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "z_image": _z_image,
    "qwen_image": _qwen_image,
    "lumina2": _lumina2,
}


def tiny(name: str, **scheduler: Any) -> Any:
    """A tiny random pipeline in float32 on the CPU, in `eval` mode; the global random state is preserved.

    Args:
        scheduler: entries that override the scheduler's config.
    """
    return random_pipeline(lambda: PIPELINES[name](scheduler))
