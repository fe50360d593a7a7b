"""The base models that ship with the package, and the one door through which any base is loaded.

pipe = veneer.bases.load("shipped")             # or a diffusers folder, or a name on the hub
clip = veneer.bases.load_clip()                 # (model, preprocess, tokenizer)
preset = veneer.bases.preset("shipped")         # prompts, resolution, guidance scale and steps that suit it
"""

from .door import load
from .features import BaseClip, load_clip
from .folders import SHIPPED, BaseError, examples, path
from .presets import Preset, preset
from .quick_gelu import quick_gelu_mismatch

__all__ = [
    "SHIPPED", "BaseClip", "BaseError", "Preset", "examples", "load", "load_clip", "path", "preset", "quick_gelu_mismatch",
]  # fmt: skip
