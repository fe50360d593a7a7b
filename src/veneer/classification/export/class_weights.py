"""Constant class embeddings of a CLIP classifier, which replace its text tower in a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from veneer.models.clip_classifier import CLIPClassifier, TextHead

TEXT_PARTS = (
    "text", "text_decoder", "transformer", "token_embedding", "ln_final", "positional_embedding", "text_projection", "attn_mask",
)  # fmt: skip
"""Modules and tensors of an open_clip model that the image tower does not use."""


class ConstantWeights(nn.Module):
    """Class weights (classes, width) as a buffer. `weight`: their value."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        """The class weights. `features` are ignored."""
        return self.get_buffer("weight")


@torch.no_grad()
def constant_class_weights(model: CLIPClassifier) -> Tensor | None:
    """Normalized class weights (classes, width), or None if they depend on the image: then there is one set per image."""
    head: Any = model.head
    parameter = next(model.clip.visual.parameters())  # type: ignore[union-attr]
    weights: Tensor = head.texts(torch.zeros(2, head.in_features, device=parameter.device, dtype=parameter.dtype))
    return normalize(weights, dim=-1) if weights.dim() == 2 else None


@contextlib.contextmanager
def without_text_tower(model: nn.Module) -> Iterator[None]:
    """Replaces the text tower by its class weights inside the block, if there is a text head and they are constant."""
    head: Any = getattr(model, "head", None)
    weights = constant_class_weights(model) if isinstance(model, CLIPClassifier) and isinstance(head, TextHead) else None
    if weights is None:
        yield
        return
    clip: Any = model.clip
    tables = (clip._modules, clip._parameters, clip._buffers)
    before, texts = [dict(table) for table in tables], head.texts
    head.texts = ConstantWeights(weights)
    for table in tables:
        for name in TEXT_PARTS:
            table.pop(name, None)
    try:
        yield
    finally:
        head.texts = texts
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
