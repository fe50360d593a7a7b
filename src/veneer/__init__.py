"""Parameter-efficient fine-tuning of vision and diffusion models: small trained adapters on a frozen base model.

tuned = veneer.attach(model, "lora", rank=8)    # a timm, open_clip, transformers or diffusers model, or a whole pipeline
...                                             # any training loop
tuned.save("my-adapter")
veneer.load(model, "my-adapter.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from veneer.version import __version__ as __version__

if TYPE_CHECKING:
    from veneer import (
        adapter_merging,
        base_models,
        classification,
        control,
        formats,
        functional,
        hosts,
        injection,
        methods,
        models,
        testing,
        training,
    )
    from veneer.adapter_merging.delta_weights import CombineError
    from veneer.attention_heads.layers import HeadsError
    from veneer.benchmarks.shapes import BenchError
    from veneer.captioning.errors import CaptionError
    from veneer.classification.data.transforms import ViewError
    from veneer.classification.export.export_format import ExportError
    from veneer.classification.models.classifier import ModelError
    from veneer.formats import load, load_all
    from veneer.hub.errors import HubError
    from veneer.injection import Attachment, Average, Parallel, Stack, activate, attach, attachments, compose, merges, mixed
    from veneer.injection.errors import (
        BaseModelError,
        BlockedGradient,
        ConditionError,
        DeadSite,
        EmptySelection,
        HostChanged,
        LoadError,
        MissingExtra,
        NotSelected,
        OptionError,
        SaveError,
        SelectionError,
        StateError,
        UnknownName,
        UnknownOption,
        UnsupportedSite,
        VeneerError,
        VeneerWarning,
    )
    from veneer.injection.towers import sites
    from veneer.methods.additive.clip.tip_adapter import TipAdapterError
    from veneer.models.tokenizer import TextError
    from veneer.prompt_transfer.stored_prompts import StoredPromptError
    from veneer.training.data.image_io import DataError, DataWarning, PhotoError
    from veneer.training.data.latent_cache import CacheWarning
    from veneer.training.families.errors import PromptError, PromptWarning
    from veneer.training.loop.checkpoints import CheckpointError, CheckpointWarning
    from veneer.training.loop.disk_space import DiskFull
    from veneer.training.loop.divergence import Diverged
    from veneer.training.loop.errors import TrainError
    from veneer.training.loop.optimizers.catalog import OptimizerWarning
    from veneer.training.preflight.preflight import PreflightError

__all__ = [
    "Attachment", "Average", "BaseModelError", "BenchError", "BlockedGradient", "CacheWarning", "CaptionError",
    "CheckpointError", "CheckpointWarning", "CombineError", "ConditionError", "DataError", "DataWarning", "DeadSite",
    "DiskFull", "Diverged", "EmptySelection", "ExportError", "HeadsError", "HostChanged", "HubError", "LoadError",
    "MissingExtra", "ModelError", "NotSelected", "OptimizerWarning", "OptionError", "Parallel", "PhotoError",
    "PreflightError", "PromptError", "PromptWarning", "SaveError", "SelectionError", "Stack", "StateError",
    "StoredPromptError", "TextError", "TipAdapterError", "TrainError", "UnknownName", "UnknownOption", "UnsupportedSite",
    "VeneerError", "VeneerWarning", "ViewError", "activate", "adapter_merging", "attach", "attachments", "base_models",
    "classification", "compose", "control", "formats", "functional", "hosts", "injection", "load", "load_all", "merges",
    "methods", "mixed", "models", "sites", "testing", "training",
]  # fmt: skip

_MODULES = {
    "adapter_merging.delta_weights": ("CombineError",),
    "benchmarks.shapes": ("BenchError",),
    "attention_heads.layers": ("HeadsError",),
    "captioning.errors": ("CaptionError",),
    "classification.data.transforms": ("ViewError",),
    "classification.export.export_format": ("ExportError",),
    "classification.models.classifier": ("ModelError",),
    "formats": ("load", "load_all"),
    "hub.errors": ("HubError",),
    "injection": (
        "Attachment", "Average", "Parallel", "Stack", "activate", "attach", "attachments", "compose", "merges", "mixed",
    ),
    "injection.errors": (
        "BaseModelError", "BlockedGradient", "ConditionError", "DeadSite", "EmptySelection", "HostChanged", "LoadError",
        "MissingExtra", "NotSelected", "OptionError", "SaveError", "SelectionError", "StateError", "UnknownName",
        "UnknownOption", "UnsupportedSite", "VeneerError", "VeneerWarning",
    ),
    "injection.towers": ("sites",),
    "methods.additive.clip.tip_adapter": ("TipAdapterError",),
    "models.tokenizer": ("TextError",),
    "prompt_transfer.stored_prompts": ("StoredPromptError",),
    "training.data.image_io": ("DataError", "DataWarning", "PhotoError"),
    "training.data.latent_cache": ("CacheWarning",),
    "training.families.errors": ("PromptError", "PromptWarning"),
    "training.loop.checkpoints": ("CheckpointError", "CheckpointWarning"),
    "training.loop.disk_space": ("DiskFull",),
    "training.loop.divergence": ("Diverged",),
    "training.loop.errors": ("TrainError",),
    "training.loop.optimizers.catalog": ("OptimizerWarning",),
    "training.preflight.preflight": ("PreflightError",),
}  # fmt: skip
"""Modules that define public names; the other public names are submodules."""

if not TYPE_CHECKING:  # so that type checkers report unknown names

    def __getattr__(name: str) -> object:
        """Imports public names and submodules on first use: `import veneer` alone does not import torch."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for module, names in _MODULES.items():
            if name in names:
                return globals().setdefault(name, getattr(importlib.import_module(f".{module}", __name__), name))
        return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
