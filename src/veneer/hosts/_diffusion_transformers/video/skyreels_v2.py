"""SkyReels-V2: Wan's blocks, with causal attention over blocks of frames (Skywork, 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..record import Blocks, TransformerRecord
from . import wan


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    rate = {"fps": [0, 1]} if model.config["inject_sample_info"] else {}
    return {**wan.sample(draw, model), **rate}


RECORD = TransformerRecord(
    classes=("SkyReelsV2Transformer3DModel",),
    modules=(
        "patch_embedding", "condition_embedder", "fps_embedding", "fps_projection", Blocks("blocks", wan.BLOCK),
        "scale_shift_table", "proj_out",
    ),
    sample=_sample,
    tiny={"skyreels_v2": {**wan.TINY, "inject_sample_info": True}},
    roles={**wan.RECORD.roles, "fps_embedding": "time.embed", "fps_projection": "time.embed"},
)  # fmt: skip
