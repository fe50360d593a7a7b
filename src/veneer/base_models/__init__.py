"""The bundled base models, and loading of any other base model.

pipe = veneer.base_models.load("bundled")             # or a diffusers folder, or a name on the hub
pipe = veneer.base_models.load("bundled", quantize="nf4")   # frozen linear layers of the denoiser in 4 bits
clip = veneer.base_models.load_clip()                 # the bundled CLIP: (model, preprocess, tokenizer)
preset = veneer.base_models.preset("bundled")         # its prompts, resolution, guidance scale and steps
"""

from veneer.injection.errors import BaseModelError

from .architectures import ARCHITECTURES, architecture
from .clip_features import BaseClip, load_clip
from .folders import BUNDLED, EXAMPLES, current_name, examples, path
from .loading import load
from .presets import Preset, preset
from .quantization import parse_quantize, quantize_model
from .quantized_linear import KINDS
from .quick_gelu import quick_gelu_mismatch

__all__ = [
    "ARCHITECTURES", "BUNDLED", "EXAMPLES", "KINDS", "BaseClip", "BaseModelError", "Preset", "architecture", "current_name",
    "examples", "load", "load_clip", "parse_quantize", "path", "preset", "quantize_model", "quick_gelu_mismatch",
]  # fmt: skip
