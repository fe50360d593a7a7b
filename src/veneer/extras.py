"""Optional dependencies: which extra of the package installs which library."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping

EXTRAS: Mapping[str, str] = {
    "timm": "timm",
    "open_clip": "open-clip",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "tokenizers": "diffusers",
    "accelerate": "train",
    "torchvision": "train",
    "scipy": "train",
    "sklearn": "train",
    "skimage": "train",
    "matplotlib": "train",
    "tensorboard": "train",
    "gradio": "app",
    "starlette": "app",
    "pandas": "app",
    "argcomplete": "completion",
    "tomlkit": "train",
    "yaml": "train",
    "bitsandbytes": "quantize",
    "torchao": "quantize",
    "optimum": "quantize",
    "gguf": "quantize",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "cv2": "base",
    "OpenEXR": "base",
    "resvg_py": "base",
    "vtkmodules": "base",
}
"""Module name -> the extra that installs its library."""


REMARKS = ("torchao", "bitsandbytes.backends.cpu.ops", "diffusers.quantizers.torchao", "torch.utils._pytree")
"""Loggers with remarks on missing optional kernels: diffusers imports every library of quantization that is installed."""


def require(*modules: str) -> None:
    """Check that libraries are installed, without importing them. With diffusers or transformers, `REMARKS` log errors only.

    Raises:
        MissingExtra: the first one that is not installed; names the extra that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            from veneer.injection.errors import MissingExtra

            raise MissingExtra(advice(module), library=module, extra=EXTRAS[module])
    if not {"diffusers", "transformers"}.isdisjoint(modules):
        for name in REMARKS:
            logger = logging.getLogger(name)
            logger.setLevel(logger.level or logging.ERROR)


def advice(module: str | None) -> str:
    """How to install the library of a module; empty if no extra has it."""
    extra = EXTRAS.get((module or "").partition(".")[0])
    return f'{module} is not installed; install it with: pip install "veneer[{extra}]"' if extra else ""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the report and the progress bar with which transformers loads weights; callers check for missing ones."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
