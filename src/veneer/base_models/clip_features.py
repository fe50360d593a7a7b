"""The CLIP that judges pictures: the bundled one, or any open_clip folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from veneer.injection.errors import BaseModelError

from .folders import path


class BaseClip(NamedTuple):
    """An open_clip model with what it needs to read pictures and texts; unpacks as `model, preprocess, tokenizer`.

    Args:
        model: the open_clip model, in `eval` mode.
        preprocess: a picture to (3, height, width).
        tokenizer: texts to ids (n, length).
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features (n, width) of preprocessed pictures."""
        features: Tensor = self.model.encode_image(pixels)
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        """Features (n, width) of token ids."""
        features: Tensor = self.model.encode_text(ids)
        return features


def load_clip(base: str | Path = "bundled_clip") -> BaseClip:
    """Load the bundled CLIP, or an open_clip folder, in float32; nothing is downloaded.

    Raises:
        BaseModelError: no such folder, or no `open_clip_config.json` or safetensors in it.
    """
    import open_clip

    folder = path("bundled_clip") if base == "bundled_clip" else Path(base).expanduser()
    if not (folder / "open_clip_config.json").is_file():
        message = f"bases.load_clip: no open_clip_config.json in {folder}; expected 'bundled_clip' or an open_clip folder."
        raise BaseModelError(message, file=folder, where="open_clip_config.json", given="missing")
    if not any(folder.glob("*.safetensors")):
        message = f"bases.load_clip: {folder} has no safetensors; pickles are not read. Save it again with open_clip."
        raise BaseModelError(message, file=folder, where="weights", expected=".safetensors")
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return BaseClip(model.eval(), preprocess, open_clip.get_tokenizer(name))
