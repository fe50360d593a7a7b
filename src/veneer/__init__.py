"""Thin trained layers on frozen vision and diffusion models.

tuned = veneer.attach(model, "lora", rank=8)    # any timm, transformers or diffusers model, or a whole pipeline
...                                             # any training loop
tuned.save("my-adapter")
veneer.load(model, "my-adapter.safetensors")
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.formats import load
    from veneer.injection import Attachment, activate, attach, attachments, hosts, merges, methods, mixed
    from veneer.injection.towers import sites  # `injection.sites` is a module as well

__version__ = "0.1.0"
__all__ = ["Attachment", "activate", "attach", "attachments", "hosts", "load", "merges", "methods", "mixed", "sites"]


class _Module(ModuleType):
    """The package, in which `methods` and `hosts` stay the registries when the packages of these names are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in ("hosts", "methods") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Module


def __getattr__(name: str) -> object:
    """Imports public names and submodules when they are first used: `import veneer` alone does not import torch."""
    import importlib.util

    if name in __all__:
        module = importlib.import_module(".formats" if name == "load" else ".injection", __name__)
        return globals().setdefault(name, getattr(module, name))
    if not name.startswith("_") and importlib.util.find_spec(f".{name}", __name__):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
