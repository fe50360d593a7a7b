"""Z-Image: refiners of noise and text, then blocks over both with norms after each branch (Tongyi Lab, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..parts import Attention, FeedForward, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    return {
        "x": [draw.normal(model.config["in_channels"], 1, 8, 8) for _ in range(2)],
        "t": draw.tensor([0.25, 0.75], draw.dtype),
        "cap_feats": [draw.normal(5, model.config["cap_feat_dim"]) for _ in range(2)],
    }


REFINER = (
    Modules("adaLN_modulation", "attention_norm1"), Attention("attention", norm="attention_norm1"),
    Modules("attention_norm2", "ffn_norm1"),
    FeedForward("feed_forward", norm="ffn_norm1", layers={"w1": "gate", "w3": "in", "w2": "out"}), Modules("ffn_norm2"),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("ZImageTransformer2DModel",),
    modules=(
        "t_embedder", "all_x_embedder", "x_pad_token", Blocks("noise_refiner", REFINER, "noise_refiner"), "cap_embedder",
        "cap_pad_token", Blocks("context_refiner", REFINER, "context_refiner"),
        Blocks("layers", (*REFINER, Stream("ffn_norm2")), "layers"), "all_final_layer.*.adaLN_modulation",
        "all_final_layer.*.linear",
    ),
    sample=_sample,
    tiny={
        "z_image": {
            "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 20,
            "axes_dims": [4, 2, 2], "axes_lens": [80, 8, 8],
        },
    },
    roles={
        "t_embedder": "time.embed", "cap_embedder": "embed.context", "all_x_embedder": "embed.patch", "adaLN_modulation": "adaln",
        "linear": "proj.out",
    },
    full_size={"Z-Image": ({}, 6_154_908_736)},
)  # fmt: skip
