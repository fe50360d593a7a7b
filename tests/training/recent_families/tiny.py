"""Tiny real pipelines of the families of `language_model`. Widths differ where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from tests.training.language_model_families.tiny import QWEN
from tests.training.transformer_families.tiny import qwen_vision_model
from veneer.testing.pipelines import random_pipeline, tiny_clip, tiny_t5, tiny_vae
from veneer.testing.tokenizers import WORDS, clip_tokenizer, gemma_tokenizer, qwen_tokenizer, t5_tokenizer


def _hunyuan_image(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    tokenizer, glyphs = qwen_tokenizer(QWEN), transformers.ByT5Tokenizer()
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 24, "text_embed_2_dim": 20, "rope_axes_dim": (4, 4),
    }  # fmt: skip
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 5.0, **scheduler}),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
            spatial_compression_ratio=4, sample_size=32, scaling_factor=0.75,
        ),
        text_encoder=qwen_vision_model(tokenizer, 24),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(20, glyphs),
        tokenizer_2=glyphs,
        transformer=diffusers.HunyuanImageTransformer2DModel(**{**config, **denoiser}),
    )  # fmt: skip
    pipe.tokenizer_max_length = 200  # 1,000 of a saved pipeline
    return pipe


OVIS = (
    "user assistant think Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships "
    "of the objects and background"
)
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}


def qwen3_model(tokenizer: Any, width: int) -> Any:
    """A `Qwen3Model` of a width for a tokenizer."""
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen3Model(config)


def _ovis_image(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    tokenizer = qwen_tokenizer(OVIS)
    config = {
        "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return diffusers.OvisImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, "shift": 3.0, **scheduler}),
        vae=tiny_vae(4, (4, 8, 12), **FLUX_VAE),
        text_encoder=qwen3_model(tokenizer, 24),
        tokenizer=tokenizer,
        transformer=diffusers.OvisImageTransformer2DModel(**{**config, **denoiser}),
    )


def _bria(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    tokenizer = t5_tokenizer()
    config = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 20, "axes_dims_rope": [0, 4, 4], "rope_theta": 1000,
    }  # fmt: skip
    return diffusers.BriaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=tiny_vae(4, (4, 8, 12), **FLUX_VAE),
        text_encoder=tiny_t5(20, tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.BriaTransformer2DModel(**{**config, **denoiser}),
    )


def llama_tokenizer() -> Any:
    """A tokenizer with a token for each word, which begins with a start token and pads on the left, as Llama's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<unk>", "<|begin_of_text|>", "<|eot_id|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *WORDS, *map(chr, range(33, 127))]))}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", eos_token="<|eot_id|>", pad_token="<|eot_id|>", model_max_length=2048
    )


def _hidream(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    first, second, third, fourth = clip_tokenizer(128), clip_tokenizer(128, pad="!"), t5_tokenizer(), llama_tokenizer()
    text = transformers.LlamaConfig(
        vocab_size=len(fourth), hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=fourth.pad_token_id, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    config = {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "caption_channels": [24, 20], "text_emb_dim": 12 + 16, "num_routed_experts": 3,
        "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (16, 16), "llama_layers": [0, 1],
    }  # fmt: skip
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=tiny_vae(4, (4, 8, 12), **FLUX_VAE),
        text_encoder=tiny_clip(8, first, projection=12),
        tokenizer=first,
        text_encoder_2=tiny_clip(16, second, projection=16),
        tokenizer_2=second,
        text_encoder_3=tiny_t5(24, third),
        tokenizer_3=third,
        text_encoder_4=transformers.LlamaForCausalLM(text),
        tokenizer_4=fourth,
        transformer=diffusers.HiDreamImageTransformer2DModel(**{**config, **denoiser}),
    )
    pipe.default_sample_size = 10  # images have about the area of 40×40 pixels
    return pipe


def flux2_vae(channels: int) -> Any:
    """An `AutoencoderKLFlux2` with statistics in its batch norm."""
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 12),
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=16, batch_norm_eps=1e-4,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _ernie_image(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    tokenizer = llama_tokenizer()
    config = {
        "in_channels": 12, "out_channels": 12, "hidden_size": 16, "num_attention_heads": 2, "num_layers": 2,
        "ffn_hidden_size": 28, "text_in_dim": 24, "rope_axes_dim": (4, 2, 2),
    }  # fmt: skip
    return diffusers.ErnieImagePipeline(
        transformer=with_values(diffusers.ErnieImageTransformer2DModel(**{**config, **denoiser})),
        vae=flux2_vae(3),
        text_encoder=qwen3_model(tokenizer, 24),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )


def _prx(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 64
    text = T5GemmaModuleConfig(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
        layer_types=["full_attention"] * 2, dropout_rate=0.0,
    )  # fmt: skip
    config = {
        "in_channels": 4, "context_in_dim": 20, "hidden_size": 16, "mlp_ratio": 1.75, "num_heads": 2, "depth": 2,
        "axes_dim": [4, 4],
    }  # fmt: skip
    return diffusers.PRXPipeline(
        transformer=with_values(diffusers.PRXTransformer2DModel(**{**config, **denoiser})),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        text_encoder=T5GemmaEncoder(text),
        tokenizer=tokenizer,
        vae=tiny_vae(4, (4, 8, 12), **FLUX_VAE),
        default_sample_size=64,
    )


def _omnigen(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    tokenizer = llama_tokenizer()
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0]}
    config = {
        "in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 28,
        "num_layers": 2, "pad_token_id": 0, "vocab_size": len(tokenizer), "rope_scaling": factors, "pos_embed_max_size": 16,
        "time_step_dim": 20,
    }  # fmt: skip
    return diffusers.OmniGenPipeline(
        transformer=diffusers.OmniGenTransformer2DModel(**{**config, **denoiser}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"invert_sigmas": True, "num_train_timesteps": 1, **scheduler}),
        vae=tiny_vae(4, (4, 4, 8, 12), scaling_factor=0.13025),  # the pipeline counts patches of 16 pixels
        tokenizer=tokenizer,
    )


KANDINSKY = (
    "system You are a prompt engineer Describe the image by detailing the color shape size texture quantity text spatial "
    "relationships of the objects and background user"
)


def _kandinsky5(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    tokenizer, clip = qwen_tokenizer(KANDINSKY), clip_tokenizer()
    images, videos = transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor()
    config = {
        "in_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 16, "time_dim": 12, "out_visual_dim": 4, "model_dim": 24,
        "ff_dim": 28, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4),
    }  # fmt: skip
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=with_values(diffusers.Kandinsky5Transformer3DModel(**{**config, **denoiser})),
        vae=tiny_vae(4, (4, 4, 8, 12), **FLUX_VAE),  # the pipeline's factor is 8
        text_encoder=qwen_vision_model(tokenizer, 24),
        tokenizer=transformers.Qwen2VLProcessor(image_processor=images, tokenizer=tokenizer, video_processor=videos),
        text_encoder_2=tiny_clip(16, clip),
        tokenizer_2=clip,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )
    pipe.resolutions = [(48, 32), (64, 64)]  # about 1024×1024 of a saved pipeline
    return pipe


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of Qwen3-VL's processor for messages with text alone."""


def _ideogram4(scheduler: dict[str, Any], **denoiser: Any) -> Any:
    tokenizer = qwen_tokenizer("user assistant")
    tokenizer.chat_template = CHAT
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 36,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8, "patch_size": 4,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = {
        "in_channels": 12, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "intermediate_size": 28,
        "adaln_dim": 16, "llm_features_dim": 13 * 8, "rope_theta": 10000, "mrope_section": (2, 2, 2),
    }  # fmt: skip
    return diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=flux2_vae(3),
        text_encoder=transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=diffusers.Ideogram4Transformer2DModel(**{**config, **denoiser}),
        unconditional_transformer=diffusers.Ideogram4Transformer2DModel(**{**config, **denoiser}),
    )


def with_values(model: Any) -> Any:
    """A model whose layers have no weights of zeros, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.2)
    return model


PIPELINES: dict[str, Callable[..., Any]] = {
    "hunyuan_image": _hunyuan_image,
    "ovis_image": _ovis_image,
    "bria": _bria,
    "hidream": _hidream,
    "ernie_image": _ernie_image,
    "prx": _prx,
    "omnigen": _omnigen,
    "ideogram4": _ideogram4,
    "kandinsky5": _kandinsky5,
}


def tiny(name: str, scheduler: dict[str, Any] | None = None, **denoiser: Any) -> Any:
    """A tiny random pipeline in float32 on the CPU, in `eval` mode; the global random state is preserved.

    Args:
        scheduler: entries that override the scheduler's config. `denoiser`: those that override the transformer's.
    """
    return random_pipeline(lambda: PIPELINES[name](scheduler or {}, **denoiser))
