"""PRX: attention of image tokens to text and image, with one projection for each (Photoroom, 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.injection.sites import Site

from ..._describe import SampleInputs, TowerPart
from ..parts import Branch, FusedAttention, Modules, Stream
from ..record import Blocks, TransformerRecord


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": draw.normal(2, config["in_channels"], 8, 8),
        "timestep": draw.tensor([0.25, 0.75], draw.dtype),
        "encoder_hidden_states": draw.normal(2, 5, config["context_in_dim"]),
    }


def _rows(attn: Any) -> dict[str, tuple[str, int]]:
    """Rows of `img_qkv_proj`."""
    return {f"to_{x}": (f"attn.{x}", attn.query_dim) for x in "qkv"}


@dataclass(frozen=True)
class TextProjection:
    """`txt_kv_proj` of the attention: keys and values of the text."""

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        path = f"{block}.attention"
        width = part.module(path).query_dim
        rows = {f"{path}.add_{x}": (f"attn.context.{x}", width) for x in "kv"}
        yield from part.slices(f"{path}.txt_kv_proj", "attn.kv", rows)


BLOCK = (
    Modules("modulation"),
    FusedAttention(
        "attention", "img_qkv_proj", _rows,
        layers={"norm_q": "norm.qk", "norm_k": "norm.qk", "norm_added_k": "norm.qk", "to_out.0": "attn.out"},
    ),
    TextProjection(),
    Modules("gate_proj", role="mlp.gate"), Modules("up_proj", role="mlp.in"), Modules("down_proj", role="mlp.out"),
    Branch("mlp", "post_attention_layernorm", "down_proj"), Stream("gate_proj"),
)  # fmt: skip
RECORD = TransformerRecord(
    classes=("PRXTransformer2DModel",),
    modules=(
        "txt_in", "img_in", "time_in", "resolution_embedder", Blocks("blocks", BLOCK), "final_layer.adaLN_modulation",
        "final_layer.linear",
    ),
    sample=_sample,
    tiny={
        "prx": {
            "in_channels": 4, "context_in_dim": 24, "hidden_size": 16, "mlp_ratio": 1.75, "num_heads": 2, "depth": 2,
            "axes_dim": [4, 4],
        },
    },
    roles={
        "txt_in": "embed.context", "img_in": "embed.patch", "time_in": "time.embed", "adaLN_modulation": "adaln",
        "linear": "proj.out",
    },
    full_size={"PRX": ({}, 1_170_691_648)},
)  # fmt: skip
