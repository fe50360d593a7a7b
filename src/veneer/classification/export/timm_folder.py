"""A folder with merged weights and the config of a timm model, which `timm.create_model("local-dir:FOLDER")` opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.models.clip_classifier import CLIPClassifier

from ..models.classifier import Classifier
from .export_format import ExportFormat, ExportSource, Run
from .weights_file import save_weights

OF_SOURCE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_names", "label_descriptions", "tag"}
"""Entries of a `pretrained_cfg` that describe the original weights."""
TEST_TIME = {"test_input_size", "test_crop_pct", "test_pool_size"}
"""Entries that replace the preprocessing in timm's evaluation."""


def _rejection(classifier: Classifier) -> str:
    if isinstance(classifier.model, CLIPClassifier):
        return f"{classifier.name} is an open_clip model"
    return "" if hasattr(classifier.model, "pretrained_cfg") else f"{type(classifier.model).__name__} is not a timm model"


def _write(source: ExportSource, folder: Path) -> None:
    """`model.safetensors` and `config.json`, in the layout of timm's models on the hub."""
    from timm.models import _hub

    model: Any = source.model
    folder.mkdir()
    save_weights(model.state_dict(), folder / "model.safetensors")
    labels = {"label_names": list(source.classifier.classes), **source.objective.metadata}
    config = {**labels, "pretrained_cfg": _pretrained_config(source)}
    save_config: Any = _hub.save_config_for_hf
    save_config(model, folder / "config.json", config, _arguments(source))


def _pretrained_config(source: ExportSource) -> dict[str, Any]:
    model: Any = source.model
    original = {k: v for k, v in model.pretrained_cfg.items() if v is not None and k not in OF_SOURCE | TEST_TIME}
    return original | source.preprocessing() | {"num_classes": model.num_classes, "custom_load": False}


def _arguments(source: ExportSource) -> dict[str, Any]:
    return {k: v for k, v in source.classifier.arguments.items() if k != "num_classes"}


def _load(folder: Path) -> Run:
    import timm

    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixels)
        return logits

    return run


FORMAT = ExportFormat("timm", "", ("timm",), False, _rejection, _write, _load)
