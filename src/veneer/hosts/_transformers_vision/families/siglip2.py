"""SigLIP 2's image tower for images of any aspect ratio (NaFlex): its inputs are patches (Tschannen et al., 2025)."""

from __future__ import annotations

from typing import Any

from ..._describe import SampleInputs
from ..vision_record import Head, VisionRecord
from .siglip import MODULES, TINY


def _sample(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """Grids of 2×3 and 3×3 patches, the first one padded."""
    config = model.config
    mask = draw.tensor([[1] * 6 + [0] * 3, [1] * 9])
    patches = draw.normal(2, 9, config.num_channels * config.patch_size**2)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": draw.tensor([[2, 3], [3, 3]])}


RECORD = VisionRecord(
    classes=("Siglip2VisionModel",),
    modules=MODULES,
    sample=_sample,
    roles={"patch_embedding": "embed.patch"},
    read=("position_embedding",),
    heads={"Siglip2ForImageClassification": Head("vision_model", unused=("head.",))},
    can_insert=lambda config: False,
    takes_images=False,
    tiny={"siglip2": {**{k: v for k, v in TINY.items() if k != "image_size"}, "num_patches": 16}},
)
