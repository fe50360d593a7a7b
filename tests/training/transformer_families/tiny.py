"""Tiny real pipelines of CogView4, AuraFlow, LongCat-Image and HunyuanDiT. Widths differ where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from veneer.testing.pipelines import random_pipeline, tiny_t5, tiny_vae
from veneer.testing.tokenizers import WORDS, qwen_tokenizer, t5_tokenizer

LONGCAT = (
    "system As an image captioning expert, generate a descriptive text prompt based on an image content, suitable for input to a "
    "text-to-image model. user assistant"
)
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}


def glm_tokenizer() -> Any:
    """A tokenizer with a token for each word, which begins with two special tokens and pads on the left, as GLM's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<unk>", "<|endoftext|>", "[gMASK]", "<sop>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *WORDS, *map(chr, range(33, 127))]))}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    start = [("[gMASK]", 2), ("<sop>", 3)]
    bare.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=start)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", pad_token="<|endoftext|>", padding_side="left", model_max_length=2048
    )


def _cogview4(scheduler: dict[str, Any]) -> Any:
    tokenizer = glm_tokenizer()
    text = transformers.GlmConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=28, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    shifts = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.GlmModel(text),
        vae=tiny_vae(4, (4, 8, 12), scaling_factor=0.7),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=24,
            time_embed_dim=20, condition_dim=4, sample_size=16, rope_axes_dim=(16, 16),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{**shifts, **scheduler}),
    )  # fmt: skip


def tiny_umt5(width: int, tokenizer: Any) -> Any:
    """A UMT5 text encoder of a width for a tokenizer."""
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=6, d_ff=28, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return transformers.UMT5EncoderModel(config)


def _auraflow(scheduler: dict[str, Any]) -> Any:
    tokenizer = t5_tokenizer()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_umt5(20, tokenizer),
        vae=tiny_vae(4, (4, 8, 12), scaling_factor=0.13025),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=16, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=20, caption_projection_dim=16, pos_embed_max_size=64,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 1.73, **scheduler}),
    )  # fmt: skip


def qwen_vision_model(tokenizer: Any, width: int) -> Any:
    """A `Qwen2_5_VLForConditionalGeneration` of a width for a tokenizer."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        "eos_token_id": None, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width, "patch_size": 4,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _longcat_image(scheduler: dict[str, Any]) -> Any:
    tokenizer = qwen_tokenizer(LONGCAT)
    images = transformers.Qwen2VLImageProcessor()
    videos = transformers.Qwen2VLVideoProcessor()
    return diffusers.LongCatImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, "shift": 3.0, **scheduler}),
        vae=tiny_vae(16, (4, 8, 12), **FLUX_VAE),
        text_encoder=qwen_vision_model(tokenizer, 24),
        tokenizer=tokenizer,
        text_processor=transformers.Qwen2VLProcessor(image_processor=images, tokenizer=tokenizer, video_processor=videos),
        transformer=diffusers.LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=[2, 2, 4],
        ),
    )


def bert_tokenizer() -> Any:
    """A `BertTokenizer` with one token per word of `WORDS`, and single ASCII characters for everything else."""
    characters = [chr(c) for c in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *characters, *("##" + c for c in characters)]
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, model_max_length=77)


def _hunyuan_dit(scheduler: dict[str, Any]) -> Any:
    first, second = bert_tokenizer(), t5_tokenizer(256)
    text = transformers.BertConfig(
        vocab_size=len(first), hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, pad_token_id=0,
    )  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.03, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    return diffusers.HunyuanDiTPipeline(
        vae=tiny_vae(4, (4, 4, 8, 12), scaling_factor=0.13025),
        text_encoder=transformers.BertModel(text),
        tokenizer=first,
        text_encoder_2=tiny_t5(24, second),
        tokenizer_2=second,
        transformer=diffusers.HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=8, hidden_size=16, num_layers=4, sample_size=16, patch_size=2,
            in_channels=4, cross_attention_dim=12, cross_attention_dim_t5=24, pooled_projection_dim=20, text_len=77,
            text_len_t5=256,
        ),
        scheduler=diffusers.DDPMScheduler(**{**betas, "steps_offset": 1, "clip_sample": False, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cogview4": _cogview4,
    "auraflow": _auraflow,
    "longcat_image": _longcat_image,
    "hunyuan_dit": _hunyuan_dit,
}


def tiny(name: str, **scheduler: Any) -> Any:
    """A tiny random pipeline in float32 on the CPU, in `eval` mode; the global random state is preserved.

    Args:
        scheduler: entries that override the scheduler's config.
    """
    return random_pipeline(lambda: PIPELINES[name](scheduler))
