"""HunyuanImage 2.1: a refiner of the text, a projection of glyphs, then the blocks of FLUX.1 (Tencent, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..image.flux import SINGLE
from ..image.sd3 import JOINT
from ..record import Blocks, TransformerRecord
from ..video.hunyuan_video import REFINER


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    inputs = {
        "hidden_states": draw.normal(2, config["in_channels"], 4, 4),
        "timestep": draw.tensor([37.0, 801.0], draw.dtype),
        "encoder_hidden_states": draw.normal(2, 5, config["text_embed_dim"]),
        "encoder_attention_mask": draw.tensor([[1] * 5] * 2),
    }
    if config["text_embed_2_dim"] is not None:
        inputs["encoder_hidden_states_2"] = draw.normal(2, 3, config["text_embed_2_dim"])
        inputs["encoder_attention_mask_2"] = draw.tensor([[1] * 3] * 2)
    if config["guidance_embeds"]:
        inputs["guidance"] = draw.tensor([1000.0, 3500.0], draw.dtype)
    if config["use_meanflow"]:
        inputs["timestep_r"] = draw.tensor([0.0, 700.0], draw.dtype)
    return inputs


RECORD = TransformerRecord(
    classes=("HunyuanImageTransformer2DModel",),
    modules=(
        "time_guidance_embed", "x_embedder", "context_embedder.time_text_embed", "context_embedder.proj_in",
        Blocks("context_embedder.token_refiner.refiner_blocks", REFINER, "text"), "context_embedder_2",
        Blocks("transformer_blocks", JOINT, "double"), Blocks("single_transformer_blocks", SINGLE, "single"), "norm_out",
        "proj_out",
    ),
    sample=_sample,
    tiny={
        "hunyuan_image": {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
            "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 24, "rope_axes_dim": (4, 4),
        },  # without a projection of glyphs, whose inner width is 2048
    },
    roles={"context_embedder_2": "embed.context", "timestep_embedder_r": "time.embed"},
    full_size={"HunyuanImage 2.1": ({"text_embed_2_dim": 1472}, 17_425_795_520)},
)  # fmt: skip
