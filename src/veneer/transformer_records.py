"""Records of diffusion transformers, with which another package adds a family to the host `diffusers_dit`.

A record is an entry point of the group `veneer.transformer_records`, or registered in this process:

register("clay", TransformerRecord(classes=("ClayTransformer",), library="clay.models", modules=…, sample=…, tiny=…))
"""

from __future__ import annotations

from veneer.hosts._describe import SampleInputs
from veneer.hosts._diffusion_transformers import REGISTRY
from veneer.hosts._diffusion_transformers.parts import Attention, Branch, FeedForward, FusedAttention, Modules, Stream
from veneer.hosts._diffusion_transformers.record import Blocks, TransformerRecord

__all__ = [
    "Attention", "Blocks", "Branch", "FeedForward", "FusedAttention", "Modules", "SampleInputs", "Stream", "TransformerRecord",
    "names", "register", "unregister",
]  # fmt: skip


def names() -> list[str]:
    """The names of all families, those of other packages included."""
    return sorted(REGISTRY.records())


def register(name: str, record: TransformerRecord) -> TransformerRecord:
    """Adds a record in this process, for notebooks and tests.

    Args:
        name: of the family.
    Returns:
        The record.
    Raises:
        VeneerError: the name, a class or a small model of the record is taken, or it is not a record.
    """
    return REGISTRY.register(name, record)


def unregister(name: str) -> None:
    """Removes a record that `register` added.

    Raises:
        VeneerError: `register` added no record of this name.
    """
    REGISTRY.unregister(name)
