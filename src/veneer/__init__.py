"""Thin trained layers on frozen vision and diffusion models.

tuned = veneer.attach(model, "lora", rank=8)    # any timm, transformers or diffusers model, or a whole pipeline
...                                             # any training loop
tuned.save("my-adapter")
veneer.load(model, "my-adapter.safetensors")
"""

# The packages first: loading one later would put it in the place of the registry of its name.
from . import hosts as _host_files  # noqa: F401
from . import methods as _method_files  # noqa: F401
from .formats import load
from .injection import Attachment, activate, attach, attachments, hosts, merges, methods, mixed, sites

__version__ = "0.1.0"
__all__ = ["Attachment", "activate", "attach", "attachments", "hosts", "load", "merges", "methods", "mixed", "sites"]


def __getattr__(name: str) -> object:
    """`veneer.bases` and `veneer.combining` are imported when they are first used."""
    if name in ("bases", "combining"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
