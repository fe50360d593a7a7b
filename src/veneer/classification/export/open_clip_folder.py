"""A folder with the merged towers of a CLIP in open_clip's layout, and its class embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from veneer.atomic_files import write_json
from veneer.models.clip_classifier import CLIPClassifier, TextHead

from ..models.classifier import Classifier
from ..models.open_clip_loading import CROPS, source_of
from .class_weights import constant_class_weights
from .export_format import ExportError, ExportFormat, ExportSource, Run
from .weights_file import save_weights

HEAD = "class_embeddings.safetensors"


def _rejection(classifier: Classifier) -> str:
    if not isinstance(classifier.model, CLIPClassifier):
        return f"{classifier.name} is a timm model"
    return "" if isinstance(classifier.model.head, TextHead) else f"{classifier.name} has a linear head"


def _write(source: ExportSource, folder: Path) -> None:
    """`open_clip_config.json`, `open_clip_model.safetensors`, the files of a tokenizer, and the class embeddings."""
    import open_clip

    model: Any = source.model
    architecture = source_of(source.classifier.name)[0]
    weights = constant_class_weights(model)
    if weights is None:
        reason = "class embeddings that depend on the image"
        raise ExportError(f"open_clip: the classifier has {reason}.", where="open_clip", given=reason)
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": _preprocessing(source)}
    write_json(folder / "open_clip_config.json", config)
    save_weights(model.clip.state_dict(), folder / "open_clip_model.safetensors")
    tokenizer = open_clip.get_tokenizer(architecture)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    labels = {"label_names": json.dumps(source.classifier.classes, ensure_ascii=False)}
    save_weights({"weight": weights}, folder / HEAD, labels)


def _preprocessing(source: ExportSource) -> dict[str, Any]:
    config = source.preprocessing()
    modes = {crop: mode for mode, crop in CROPS.items()}
    return {
        "size": config["input_size"][1:],
        "mode": "RGB",
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "resize_mode": modes[config["crop_mode"]],
    }


def _load(folder: Path) -> Run:
    import open_clip

    clip: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    weight = load_file(folder / HEAD)["weight"]

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        logits = clip.logit_scale.exp() * normalize(clip.encode_image(pixels), dim=-1) @ weight.T
        return logits if clip.logit_bias is None else logits + clip.logit_bias

    return run


FORMAT = ExportFormat("open_clip", "", ("open_clip",), False, _rejection, _write, _load)
