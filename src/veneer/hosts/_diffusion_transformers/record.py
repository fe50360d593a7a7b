"""The record of a family of diffusion transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from .._diffusers import processor_order
from .._records.block_parts import Blocks
from .._records.model_record import ModelRecord

__all__ = ["Blocks", "TransformerRecord"]

ROLES = {
    "pos_embed": "embed.patch", "patch_embed": "embed.patch", "x_embedder": "embed.patch", "context_embedder": "embed.context",
    "caption_projection": "embed.context", "linear": "adaln", "proj_out": "proj.out", "proj_out_1": "adaln",
    "proj_out_2": "proj.out", "scale_shift_table": "adaln.table",
}  # fmt: skip
"""Roles of layers and parameters outside of the blocks, by the last component of their path that is here."""


@dataclass(frozen=True, kw_only=True)
class TransformerRecord(ModelRecord):
    """A family of diffusion transformers of diffusers. Arguments as for `ModelRecord`.

    Args:
        gradient_modes: name of a class of modules that stop gradients in evaluation mode to the attributes with which they do
            not; see `GradientMode`.
    """

    library: ClassVar[str] = "diffusers"
    default_roles: ClassVar[Mapping[str, str]] = ROLES
    gradient_modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def attention_order(self, model: nn.Module) -> Mapping[str, int]:
        return processor_order(model)
