"""Tiny real pipelines of FLUX.2, Chroma, Sana and Krea 2, with tokenizers built from word lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from veneer.testing.pipelines import random_pipeline, tiny_t5, tiny_vae
from veneer.testing.tokenizers import WORDS, gemma_tokenizer, qwen_tokenizer, t5_tokenizer

INSTRUCT = (
    "{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}[INST]{% endif %}"
    "{{ message['content'][0]['text'] }}{%- if message['role'] == 'user' %}[/INST]{% endif %}{%- endfor %}"
)


def mistral_processor() -> Any:
    """A `PixtralProcessor` whose tokenizer has a token for each word, adds a start token, and pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *WORDS, *map(chr, range(33, 127))]) if piece}
    bare = Tokenizer(models.WordLevel({p: i for i, p in enumerate(vocabulary)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        additional_special_tokens=special[4:],
    )  # fmt: skip
    images = transformers.PixtralImageProcessor()
    return transformers.PixtralProcessor(image_processor=images, tokenizer=tokenizer, chat_template=INSTRUCT)


FLUX2 = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 2, "in_channels": 24,
    "timestep_guidance_channels": 20, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip


def _flux2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 12),
        layers_per_block=1, latent_channels=6, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _flux2(denoiser: dict[str, Any]) -> Any:
    processor = mistral_processor()
    text = transformers.MistralConfig(
        vocab_size=len(processor.tokenizer), hidden_size=8, intermediate_size=12, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = transformers.PixtralVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=6, vision_feature_layer=-1, spatial_merge_size=1
    )
    return diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_flux2_vae(),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
        transformer=diffusers.Flux2Transformer2DModel(**{**FLUX2, "joint_attention_dim": 24, **denoiser}),
    )


def _qwen3(tokenizer: Any, width: int, layers: int) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def _klein(denoiser: dict[str, Any], distilled: bool = False) -> Any:
    tokenizer = qwen_tokenizer("user assistant")
    settings = {**FLUX2, "joint_attention_dim": 36, "guidance_embeds": False, **denoiser}
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_flux2_vae(),
        text_encoder=_qwen3(tokenizer, 12, 27),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(**settings),
        is_distilled=distilled,
    )


def _chroma(denoiser: dict[str, Any]) -> Any:
    tokenizer = t5_tokenizer()
    config = {
        "in_channels": 24, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 60, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 16,
        "approximator_hidden_dim": 20, "approximator_layers": 1,
    }  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(6, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_t5(60, tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(**{**config, **denoiser}),
    )


def _sana(denoiser: dict[str, Any]) -> Any:
    """Sana for 512 pixels, the smallest size that the pipeline accepts with its default settings."""
    instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = gemma_tokenizer(*instruction)
    text = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
    )  # fmt: skip
    blocks = (4, 4, 4, 4, 8, 8)
    vae = diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=blocks, decoder_block_out_channels=blocks, encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )  # fmt: skip
    config = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 20,
        "sample_size": 16, "patch_size": 1, "mlp_ratio": 1.5,
    }  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(text),
        vae=vae,
        transformer=diffusers.SanaTransformer2DModel(**{**config, **denoiser}),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


TEMPLATE = (
    "assistant system Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background user"
)


def _krea2(denoiser: dict[str, Any], distilled: bool = False) -> Any:
    tokenizer = qwen_tokenizer(TEMPLATE)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 20, "patch_size": 4,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = {
        "in_channels": 12, "num_layers": 2, "attention_head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 28, "timestep_embed_dim": 8, "text_hidden_dim": 20, "num_text_layers": 2,
        "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 36,
        "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (2, 2, 2),
    }  # fmt: skip
    return diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3], latents_std=[2.0, 0.5, 1.5],
        ),
        text_encoder=transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=diffusers.Krea2Transformer2DModel(**{**config, **denoiser}),
        text_encoder_select_layers=(1, 3),
        is_distilled=distilled,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "flux2": _flux2,
    "flux2_klein": _klein,
    "chroma": _chroma,
    "sana": _sana,
    "krea2": _krea2,
}


def tiny(name: str, **denoiser: Any) -> Any:
    """A tiny random pipeline in float32 on the CPU, in `eval` mode; the global random state is preserved."""
    return random_pipeline(lambda: PIPELINES[name](denoiser))
