"""The base models that ship with the package, and the one door through which any base is loaded.

pipe = veneer.base_models.load("bundled")             # or a diffusers folder, or a name on the hub
clip = veneer.base_models.load_clip()                 # (model, preprocess, tokenizer)
preset = veneer.base_models.preset("bundled")         # prompts, resolution, guidance scale and steps that suit it
"""

from veneer.injection.errors import BaseModelError

from .clip_features import BaseClip, load_clip
from .folders import BUNDLED, current_name, examples, path
from .loading import load
from .presets import Preset, preset
from .quick_gelu import quick_gelu_mismatch

__all__ = [
    "BUNDLED", "BaseClip", "BaseModelError", "Preset", "current_name", "examples", "load", "load_clip", "path", "preset",
    "quick_gelu_mismatch",
]  # fmt: skip
