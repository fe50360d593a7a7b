"""Tiny real pipelines of Wan 2.1, Wan 2.2 with two experts or a time for each token, and HunyuanVideo. Widths differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from tests.training.transformer_families.tiny import tiny_umt5
from veneer.testing.pipelines import random_pipeline, tiny_clip
from veneer.testing.tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3, "text_dim": 20, "freq_dim": 8,
    "ffn_dim": 28, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def _wan(scheduler: dict[str, Any], experts: int = 1, **settings: Any) -> Any:
    tokenizer = t5_tokenizer()
    transformer = [diffusers.WanTransformer3DModel(**WAN) for _ in range(experts)]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_umt5(20, tokenizer),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3], latents_std=[2.0, 0.5, 1.5], scale_factor_spatial=4, scale_factor_temporal=2,
        ),
        transformer=transformer[0],
        transformer_2=transformer[1] if experts > 1 else None,
        scheduler=diffusers.UniPCMultistepScheduler(**{**flow, **scheduler}),
        **settings,
    )  # fmt: skip


def _hunyuan_video(scheduler: dict[str, Any]) -> Any:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    first, second = qwen_tokenizer(str(DEFAULT_PROMPT_TEMPLATE["template"])), clip_tokenizer()
    first.add_special_tokens({"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]})
    text = transformers.LlamaConfig(
        vocab_size=len(first), hidden_size=24, intermediate_size=28, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=first.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(text),
        tokenizer=first,
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=5, out_channels=5, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=2,
            num_refiner_layers=1, text_embed_dim=24, pooled_projection_dim=20, rope_axes_dim=(4, 2, 2),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=5, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.476986
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 7.0, **scheduler}),
        text_encoder_2=tiny_clip(20, second),
        tokenizer_2=second,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "wan": _wan,
    "wan_experts": lambda scheduler: _wan(scheduler, 2, boundary_ratio=0.875),
    "wan_5b": lambda scheduler: _wan(scheduler, expand_timesteps=True),
    "hunyuan_video": _hunyuan_video,
}


def tiny(name: str, **scheduler: Any) -> Any:
    """A tiny random pipeline in float32 on the CPU, in `eval` mode; the global random state is preserved.

    Args:
        scheduler: entries that override the scheduler's config.
    """
    return random_pipeline(lambda: PIPELINES[name](scheduler))
