"""The class prompts of a CLIP whose image tower accepts inserted tokens."""

from __future__ import annotations

from dataclasses import dataclass

from .sites import PromptSite, TokenSite


@dataclass(frozen=True, kw_only=True)
class MultimodalPromptSite(PromptSite):
    """The class prompts of a CLIP, and the token sequences of its image tower.

    Args:
        layers: blocks of the text tower.
        images: the token sequence of each block of the image tower, in order.
        image_norm: path of the norm between the position embedding and the first block of the image tower, or "" for none.
    """

    layers: int
    images: tuple[TokenSite, ...]
    image_norm: str = ""
