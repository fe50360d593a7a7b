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
    """A family of diffusion transformers, of diffusers unless `library` names another module.

    Args:
        classes: names of the classes of the models. `library`: importable module that has them, such as `my_package.models`.
        modules: the model in the order of its forward pass: lists of blocks, and paths of other modules or parameters.
        sample: keyword inputs of a forward pass, for a model.
        tiny: config of each small model by its name, unique among all records: keyword arguments of the first class.
        gradient_modes: name of a class of modules that stop gradients in evaluation mode to the attributes with which they do
            not; see `GradientMode`.
        float32: parts of the paths of modules that take and return float32 in a model of any dtype.
        roles, inert_biases, read, inert, full_size: as for `ModelRecord`.
    """

    library: str = "diffusers"
    default_roles: ClassVar[Mapping[str, str]] = ROLES
    gradient_modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    float32: tuple[str, ...] = ()

    def attention_order(self, model: nn.Module) -> Mapping[str, int]:
        return processor_order(model)
