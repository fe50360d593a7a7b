"""Loads an open_clip model as a classifier of named classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from veneer import base_models
from veneer.hub.connection import hub
from veneer.models.clip_classifier import TEMPLATES, CLIPClassifier
from veneer.models.tokenizer import TextError
from veneer.training.loop.seeds import mix

from .classifier import Classifier, ModelError, check_weights, digest_of, download_error

CROPS = {"shortest": "center", "squash": "squash", "longest": "border"}
"""timm's crop mode of each open_clip resize mode."""


def open_clip_classifier(
    name: str,
    classes: Sequence[str],
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    templates: Sequence[str] = TEMPLATES,
    head: Literal["text", "linear"] = "text",
) -> Classifier:
    """Builds a CLIP classifier.

    Args:
        name: `bundled_clip`, or `open_clip:NAME/TAG` with open_clip's names of an architecture and its weights. The tag may be
            omitted if `weights` is set.
        weights: a safetensors file, `none` for random initialization (default: the pretrained weights).
        seed: of random weights and of a linear head. `templates`, `head`: as for `CLIPClassifier`.
    Raises:
        ModelError: no such model or weights, weights of another architecture or activation, or prompts that are too long.
    """
    import open_clip

    architecture, tag = source_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, "model"))
        clip, origin = _build(name, architecture, tag, weights)
        try:
            model = CLIPClassifier(clip, open_clip.get_tokenizer(architecture), classes, templates, head)
        except TextError as error:
            raise ModelError.from_error(error, f"{name}: {error}") from error
    return Classifier(model.eval().requires_grad_(False), name, _data(clip), tuple(classes), origin, head == "linear")


def source_of(name: str) -> tuple[str, str]:
    """open_clip's architecture and tag of a model name."""
    import open_clip

    if name == "bundled_clip":
        return f"local-dir:{base_models.path('bundled_clip')}", ""
    architecture, _, tag = name.removeprefix("open_clip:").partition("/")
    if open_clip.get_model_config(architecture) is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), 3)
        message = f"open_clip has no model {architecture!r}. Similar names: {', '.join(near or ['see open_clip.list_models()'])}."
        raise ModelError(message, where="open_clip", given=architecture, expected=tuple(near))
    if tag and tag not in (tags := open_clip.list_pretrained_tags_by_model(architecture)):
        message = f"{name}: open_clip has no weights {tag!r} for {architecture}. Available tags: {_shorten(tags)}."
        raise ModelError(message, where=architecture, given=tag, expected=tuple(tags))
    return architecture, tag


def _shorten(tags: Sequence[str]) -> str:
    more = f" and {len(tags) - 6} more" if len(tags) > 6 else ""
    return (", ".join(tags[:6]) or "none") + more


def _build(name: str, architecture: str, tag: str, weights: str | Path | None) -> tuple[nn.Module, str]:
    import open_clip

    bare: dict[str, Any] = {"load_weights": False, "pretrained_image": False, "pretrained_text": False}
    if weights == "none":
        return open_clip.create_model(architecture, **bare), "random"
    file = None if weights is None else check_weights(weights)
    source = tag if file is None else file
    if not source and name != "bundled_clip":
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        message = f"{name}: no weights given; expected {name}/TAG, --weights FILE or --weights none. Tags: {_shorten(tags)}."
        raise ModelError(message, where=architecture, given="", expected=tuple(tags))
    if name != "bundled_clip":
        with torch.device("meta"):
            outline = open_clip.create_model(architecture, device="meta", **bare)
        wrong = base_models.quick_gelu_mismatch(outline, architecture, source)
        if wrong:
            raise ModelError(wrong, where="quick_gelu", given=architecture)
    if file is not None:
        return _load_weights(open_clip.create_model(architecture, **bare), name, file), digest_of(file)
    with hub(name != "bundled_clip") as why:
        try:
            return open_clip.create_model(architecture, pretrained=tag or None), "published"
        except Exception as error:  # the hub's clients raise a dozen kinds
            raise download_error(name, why, error) from error


def _load_weights(clip: nn.Module, name: str, file: Path) -> nn.Module:
    import open_clip

    try:
        open_clip.load_checkpoint(clip, str(file))
    except (RuntimeError, KeyError, ValueError) as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:400] or str(error)[:400]
        message = f"--weights {file}: not the weights of {name}: {detail} Pass a file of this architecture."
        raise ModelError(message, file=file, given="mismatch", expected=name) from error
    return clip


def _data(clip: Any) -> dict[str, Any]:
    """Preprocessing in timm's data config format, from the model's own configuration."""
    config = clip.visual.preprocess_cfg
    size = config["size"]
    return {
        "input_size": (3, *((size, size) if isinstance(size, int) else size)),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        "crop_pct": 1.0,
        "crop_mode": CROPS[config["resize_mode"]],
    }
