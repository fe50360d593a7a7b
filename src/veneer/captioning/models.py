"""Captioning models: image-to-text models of transformers, and image classifiers as taggers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from veneer.extras import quiet_transformers, require
from veneer.injection.errors import VeneerError

from .errors import CaptionError
from .model_folder import model_folder, read_config

GENERATORS = {"blip": "BlipForConditionalGeneration", "git": "GitForCausalLM"}
"""`model_type` of a config to the class of transformers that generates captions."""
TAGS_FILE = "selected_tags.csv"
"""Tags of a WD tagger, a timm model, in the order of its outputs."""
TAG_CATEGORIES = ("0", "4")
"""Categories of `TAGS_FILE` that become captions: general tags and characters, not ratings."""
LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Options of `from_pretrained`: neither code of a repository nor a request to the hub."""
SHORT_TAG = 3
"""Underscores of longer tags become spaces; shorter ones are emoticons such as `^_^`."""


class Captioner(Protocol):
    """A model that describes images."""

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        """The caption of each image; empty if the model has none."""


def open_captioner(name: str, device: str = "cpu", threshold: float = 0.35, max_tokens: int = 40) -> Captioner:
    """Loads a captioning model from safetensors, without code of its repository.

    Args:
        name: local folder or hub name of a BLIP, a GIT, an image classifier of transformers, or a WD tagger of timm.
        threshold: smallest probability of a tag, 0 to 1. `max_tokens`: largest length of a generated caption.
    Raises:
        CaptionError: no model of these kinds, or a folder without a part of it.
        HubError: the repository cannot be downloaded.
    """
    folder = model_folder(name)
    try:
        return _open(name, folder, device, threshold, max_tokens)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, VeneerError):
            raise
        message = f"caption: {name} cannot be loaded ({error}); expected a folder of save_pretrained. Copy it again."
        given = type(error).__name__
        raise CaptionError(message, file=folder, where="files", given=given, expected="a complete model") from error


def _open(name: str, folder: Path, device: str, threshold: float, max_tokens: int) -> Captioner:
    config = read_config(folder)
    kind = str(config.get("model_type"))
    architectures = tuple(map(str, config.get("architectures") or ()))
    if (folder / TAGS_FILE).is_file() and "architecture" in config:
        return _wd_tagger(folder, device, threshold)
    require("transformers")
    with quiet_transformers():
        if kind in GENERATORS:
            return _generator(folder, GENERATORS[kind], device, max_tokens)
        if any(each.endswith("ForImageClassification") for each in architectures):
            return _classifier(folder, device, threshold)
    supported = (*GENERATORS, "ForImageClassification", TAGS_FILE)
    message = (
        f"caption: {name} is a model of type {kind!r} ({', '.join(architectures) or 'no architecture'}); expected BLIP, GIT, an "
        f"image classifier of transformers, or a timm model with {TAGS_FILE}."
    )
    raise CaptionError(message, file=folder, where="model_type", given=kind, expected=supported)


@dataclass(frozen=True)
class _Generator:
    model: Any
    processor: Any
    tokenizer: Any
    max_tokens: int

    @torch.inference_mode()
    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        tokens = self.model.generate(pixel_values=pixels, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@dataclass(frozen=True)
class _Tagger:
    """A classifier whose tags above the threshold are the caption, the most probable first.

    Args:
        probabilities: images to (n, number of tags). `tags`: name of each output, empty for one that is left out.
    """

    probabilities: Callable[[Sequence[Image.Image]], Tensor]
    tags: Sequence[str]
    threshold: float

    @torch.inference_mode()
    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        return [", ".join(self._names(row)) for row in self.probabilities(images).float().cpu()]

    def _names(self, row: Tensor) -> list[str]:
        order = row.argsort(descending=True, stable=True).tolist()
        return [self.tags[i] for i in order if self.tags[i] and row[i] >= self.threshold]


def _generator(folder: Path, class_name: str, device: str, max_tokens: int) -> Captioner:
    import transformers

    model = _load(getattr(transformers, class_name), folder, device)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    return _Generator(model, processor, tokenizer, max_tokens)


def _classifier(folder: Path, device: str, threshold: float) -> Captioner:
    import transformers

    model = _load(transformers.AutoModelForImageClassification, folder, device)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL)
    several = model.config.problem_type == "multi_label_classification"

    def probabilities(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(model.device)
        logits: Tensor = model(pixel_values=pixels).logits
        return logits.sigmoid() if several else logits.softmax(-1)

    names = model.config.id2label
    return _Tagger(probabilities, [_readable(str(names[i])) for i in range(len(names))], threshold)


def _load(model_class: Any, folder: Path, device: str) -> Any:
    model, loading = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **LOCAL)
    if missing := sorted(map(str, loading["missing_keys"])):
        message = f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; expected all weights. Copy the model again."
        raise CaptionError(message, file=folder, where="weights", given=tuple(missing), expected=())
    return model.eval().to(device)


def _wd_tagger(folder: Path, device: str, threshold: float) -> Captioner:
    """A WD tagger: square images padded with white, BGR channels, and independent probabilities."""
    require("timm")
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
    preprocess: Any = create_transform(**resolve_model_data_config(model))
    tags = _read_tags(folder / TAGS_FILE, model.num_classes)

    def probabilities(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(_square(image)) for image in images])[:, [2, 1, 0]]
        logits: Tensor = model(pixels.to(device))
        return logits.sigmoid()

    return _Tagger(probabilities, tags, threshold)


def _read_tags(file: Path, count: int) -> list[str]:
    """The tag of each output; empty for ratings."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    tags = [_readable(row.get("name") or "") if row.get("category", "0") in TAG_CATEGORIES else "" for row in rows]
    if len(tags) != count or not any(tags):
        message = f"{file}: {len(tags)} tags; expected {count} rows with the columns name and category, one for each output."
        raise CaptionError(message, file=file, where=TAGS_FILE, given=len(tags), expected=count)
    return tags


def _readable(tag: str) -> str:
    return tag.replace("_", " ") if len(tag) > SHORT_TAG else tag


def _square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas
