"""OmniGen: a language model over text, images given as inputs, the time and the image that it denoises (Xiao et al., 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..._describe import SampleInputs
from ..._diffusers import NAMES
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """Six tokens of text, three of which are an image given as an input, then the time and 2×2 patches."""
    config = model.config
    channels, patch = config["in_channels"], config["patch_size"]
    tokens = 6 + 1 + 2 * 2
    return {
        "hidden_states": draw.normal(2, channels, 2 * patch, 2 * patch),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "input_ids": draw.ids(0, config["vocab_size"], 2, 6),
        "input_img_latents": [draw.normal(1, channels, patch, 3 * patch) for _ in range(2)],
        "input_image_sizes": {0: [[2, 5]], 1: [[2, 5]]},
        "attention_mask": draw.tensor([[[1] * tokens] * tokens] * 2, draw.dtype),
        "position_ids": draw.tensor([[*range(tokens)]] * 2),
    }


def _rope(frequencies: int) -> dict[str, list[float]]:
    """Factors of the rotary embedding that change none of its frequencies."""
    return {"short_factor": [1.0] * frequencies, "long_factor": [1.0] * frequencies}


BLOCK = (
    Modules("input_layernorm"),
    Attention("self_attn", norm="input_layernorm", names=replace(NAMES, cross=False, rotary=True)),
    FeedForward("mlp", norm="post_attention_layernorm", layers={"gate_up_proj": "in_gate", "down_proj": "out"}, plain_norm=True),
    Stream("input_layernorm"),
)
RECORD = TransformerRecord(
    classes=("OmniGenTransformer2DModel",),
    modules=(
        "patch_embedding.output_image_proj", "time_token", "t_embedder", "embed_tokens", "patch_embedding.input_image_proj",
        Blocks("layers", BLOCK), "norm", "norm_out", "proj_out",
    ),
    sample=_sample,
    tiny={
        "omnigen": {
            "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 28, "num_layers": 2,
            "pad_token_id": 0, "vocab_size": 20, "rope_scaling": _rope(6), "pos_embed_max_size": 8, "time_step_dim": 20,
        },
    },
    roles={
        "embed_tokens": "embed.token", "output_image_proj": "embed.patch", "input_image_proj": "embed.patch",
        "time_token": "time.embed", "t_embedder": "time.embed",
    },
    full_size={"OmniGen": ({"rope_scaling": _rope(48)}, 3_762_072_592)},
)  # fmt: skip
