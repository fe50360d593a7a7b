"""The CLIP for similarity metrics: the bundled one, or any open_clip folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from veneer.injection.errors import BaseModelError

from .folders import path


class BaseClip(NamedTuple):
    """An open_clip model with its image transform and tokenizer; unpacks as `model, preprocess, tokenizer`.

    Args:
        model: the open_clip model, in `eval` mode.
        preprocess: converts an image to pixels (3, height, width).
        tokenizer: converts texts to ids (n, length).
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features (n, width) of preprocessed images."""
        features: Tensor = self.model.encode_image(pixels)
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        """Features (n, width) of token ids."""
        features: Tensor = self.model.encode_text(ids)
        return features


def load_clip(base: str | Path = "bundled_clip") -> BaseClip:
    """Loads the bundled CLIP or an open_clip folder in float32, without downloads.

    Raises:
        BaseModelError: no such folder, or it has no `open_clip_config.json` or no safetensors file.
    """
    import open_clip

    folder = path("bundled_clip") if base == "bundled_clip" else Path(base).expanduser()
    if not (folder / "open_clip_config.json").is_file():
        message = f"load_clip: no open_clip_config.json in {folder}; expected 'bundled_clip' or an open_clip folder."
        raise BaseModelError(message, file=folder, where="open_clip_config.json", given="missing")
    if not any(folder.glob("*.safetensors")):
        message = (
            f"load_clip: {folder} has no safetensors file, and pickles are not supported. Save the model again with open_clip."
        )
        raise BaseModelError(message, file=folder, where="weights", expected=".safetensors")
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return BaseClip(model.eval(), preprocess, open_clip.get_tokenizer(name))
