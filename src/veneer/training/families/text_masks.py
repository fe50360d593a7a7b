"""Sequences of text of variable length as one batch with a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def with_mask(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """`prompt_embeds` (batch, longest, width) with zeros at the end, and `mask` (batch, longest), int64, 1 for text.

    Args:
        rows: (tokens, width) of each prompt.
    """
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64, device=row.device) for row in rows], batch_first=True)
    return {"prompt_embeds": pad_sequence(list(rows), batch_first=True), "mask": mask}


def without_mask(text: dict[str, Tensor]) -> list[Tensor]:
    """The inverse of `with_mask`."""
    return [row[:length] for row, length in zip(text["prompt_embeds"], text_lengths(text["mask"]), strict=True)]


def text_lengths(mask: Tensor) -> list[int]:
    """Number of tokens in each row of a mask (batch, tokens). One on the meta device has no values and counts as ones."""
    return [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(dim=1).tolist()


def mask_shapes(rows: int, tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors on the meta device with the shapes and dtypes of `with_mask`, for prompts of `tokens` tokens."""
    return {
        "prompt_embeds": torch.empty(rows, tokens, width, dtype=dtype, device="meta"),
        "mask": torch.empty(rows, tokens, dtype=torch.int64, device="meta"),
    }
