"""Swin: attention in windows, and merging of patches between the stages (Liu et al., 2021).

Attention receives its patches in windows; its branch is read and written where they are one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from veneer.injection.sites import Site, StreamSite

from ..._describe import TowerPart
from ..._records.block_parts import Blocks, FeedForward, Part, Single
from ..vision_parts import MLP, Parameters, SelfAttention, Tokens, VisionPart
from ..vision_record import Head, VisionRecord

STAGES = 6
"""More than any published model has."""


@dataclass(frozen=True)
class InStage:
    """A part of a block in the stage `index`, whose grid is merged as often."""

    part: SelfAttention | FeedForward | Tokens
    index: int

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        assert isinstance(part, VisionPart)
        grid = part.place["grid"]
        for _ in range(self.index):
            grid = tuple((side + 1) // 2 for side in grid)
        yield from self.part.sites(replace(part, place={**part.place, "grid": grid}), block, order)


@dataclass(frozen=True)
class Merging:
    """The norm and the layer that merges four patches into one, and the stream."""

    def sites(self, part: TowerPart, block: str, order: Mapping[str, int]) -> Iterator[Site]:
        yield from part.norm(f"{block}.norm")
        yield from part.layer(f"{block}.reduction", "embed.merge")
        layer = part.module(f"{block}.reduction")
        sizes = {"width": layer.out_features, "d_in": layer.in_features // 4, "resamples": True}
        yield StreamSite(name=f"{block}.stream", role="sample", path=block, **sizes, **part.labels)


def _stage(index: int) -> tuple[Blocks, Single]:
    path, stage = f"encoder.layers.{index}", f"stage.{index}"
    parts = (
        SelfAttention("attention", norm="layernorm_before", scale="drop_path"),
        FeedForward("mlp", norm="layernorm_after", layers=MLP, plain_norm=True),
        Tokens("layernorm_before"),
    )
    block: tuple[Part, ...] = (
        Parameters("attention.relative_position_bias", "embed.position"), *(InStage(part, index) for part in parts),
    )  # fmt: skip
    return Blocks(f"{path}.blocks", block, stage), Single(f"{path}.downsample", (Merging(),), stage)


RECORD = VisionRecord(
    classes=("SwinModel",),
    modules=("embeddings", *(module for i in range(STAGES) for module in _stage(i)), "layernorm"),
    heads={"SwinForImageClassification": Head("swin")},
    can_insert=lambda config: False,
    tiny={
        "swin": {
            "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4,
            "use_absolute_embeddings": True,
        },
    },
    full_size={"microsoft/swin-tiny-patch4-window7-224": ({}, 27_519_354)},
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)  # fmt: skip
