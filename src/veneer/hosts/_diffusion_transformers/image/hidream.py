"""HiDream-I1: joint and single-stream blocks whose feed-forwards are mixtures of experts (HiDream.ai, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..._diffusers import AttentionNames
from ..._records.block_parts import Single
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    t5, llama = config["caption_channels"]
    return {
        "hidden_states": draw.normal(2, config["in_channels"], 8, 8),
        "timesteps": draw.tensor([37.0, 801.0], draw.dtype),
        "encoder_hidden_states_t5": draw.normal(2, 4, t5),
        "encoder_hidden_states_llama3": draw.normal(max(config["llama_layers"]) + 1, 2, 5, llama),
        "pooled_embeds": draw.normal(2, config["text_emb_dim"]),
    }


NAMES = AttentionNames(
    added=("to_q_t", "to_k_t", "to_v_t"), added_out="to_out_t", norms=("q_rms_norm", "k_rms_norm"),
    added_norms=("q_rms_norm_t", "k_rms_norm_t"), rotary=True,
)  # fmt: skip
GATED = {"w1": "gate", "w3": "in", "w2": "out"}
EXPERTS = 4
"""Routed experts of the published models, and the most that a record describes."""
MIXTURE = {
    **GATED,  # a feed-forward without routed experts
    **{f"experts.{i}.{name}": role for i in range(EXPERTS) for name, role in GATED.items()},
    **{f"shared_experts.{name}": role for name, role in GATED.items()},
}
IMAGE = (
    Modules("block.adaLN_modulation"), Attention("block.attn1", names=NAMES), Modules("block.ff_i.gate.weight", table="other"),
    FeedForward("block.ff_i", layers=MIXTURE),
)  # fmt: skip
TEXT = FeedForward("block.ff_t", role="mlp.context", layers=GATED)
RECORD = TransformerRecord(
    classes=("HiDreamImageTransformer2DModel",),
    modules=(
        "x_embedder", "t_embedder", "p_embedder", "caption_projection", Blocks("double_stream_blocks", (*IMAGE, TEXT), "double"),
        Blocks("single_stream_blocks", (*IMAGE, Stream("block.attn1")), "single"),
        Single("final_layer", (Modules("adaLN_modulation"), Modules("linear", role="proj.out"))),
    ),
    sample=_sample,
    tiny={
        "hidream": {
            "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "caption_channels": [24, 20], "text_emb_dim": 12, "num_routed_experts": 3,
            "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": [0, 1, 1],
        },
    },
    roles={"t_embedder": "time.embed", "p_embedder": "embed.context", "linear": "embed.context"},
    full_size={
        "HiDream-I1": (
            {
                "patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": (64, 32, 32),
                "llama_layers": [*range(32), *[31] * 16],
            },
            17_105_733_184,
        ),
    },
    gradient_modes={"MOEFeedForwardSwiGLU": {"training": True, "_force_inference_output": False}},
)  # fmt: skip
