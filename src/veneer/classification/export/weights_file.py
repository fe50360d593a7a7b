"""Safetensors files of whole models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from veneer.atomic_files import write_synced


def save_weights(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors, also shared ones, each as a contiguous tensor."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    write_synced(file, save(tensors, {"format": "pt", **(metadata or {})}))
