"""Building of classifiers: a timm model with a head for the classes, or a CLIP with prompts for them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import base_models
from veneer.hub.connection import hub
from veneer.training.loop.seeds import mix

from .classifier import Classifier, ModelError, check_weights, digest_of, digest_of_folder, download_error
from .open_clip_loading import open_clip_classifier, source_of
from .transformers_loading import check_transformers_name, is_transformers_name, transformers_classifier, transformers_outline


def is_clip_name(name: str) -> bool:
    """True for names of CLIP models with both towers, whose head are class embeddings."""
    return name == "bundled_clip" or name.startswith("open_clip:")


def check_name(name: str) -> None:
    """Checks that a model name is known: a bundled model, or one of timm, open_clip or transformers, without a connection.

    Raises:
        ModelError: unknown name; the error lists similar ones. A folder of transformers without its configs.
    """
    if name in ("bundled", "bundled_clip"):
        return
    if is_transformers_name(name):
        check_transformers_name(name)
        return
    if is_clip_name(name):
        source_of(name)
        return
    import timm

    architecture = name.removeprefix("timm:").partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        unknown = name.removeprefix("timm:")
        message = f"timm has no model {unknown!r}. Similar names: {', '.join(near or ['see timm.list_models()'])}."
        raise ModelError(message, where="timm", given=unknown, expected=tuple(near))


def build_without_weights(name: str) -> nn.Module | None:
    """Builds a timm, open_clip or transformers model without its pretrained weights, to inspect its structure.

    Returns:
        The model; None if the name is that of none of these libraries.
    Raises:
        ModelError: unknown `timm:`, `open_clip:` or `hf:` model.
    """
    if is_transformers_name(name):
        return transformers_outline(name)
    if name == "bundled_clip":
        return base_models.load_clip().model
    import timm

    if is_clip_name(name):
        import open_clip

        model: nn.Module = open_clip.create_model(source_of(name)[0], load_weights=False)
        return model
    if name.startswith("timm:") or ("/" not in name and timm.is_model(name.partition(".")[0])):
        check_name(name)
        model = timm.create_model(name.removeprefix("timm:"))
        return model
    return None


def open_classifier(
    name: str,
    classes: Sequence[str],
    *,
    weights: str | Path | None = None,
    keep_head: bool = False,
    size: int | None = None,
    seed: int = 0,
    templates: Sequence[str] = ("a photo of a {}.",),
) -> Classifier:
    """Builds a classifier.

    Args:
        name: `bundled`, `bundled_clip`, `open_clip:NAME/TAG`, `hf:` and a folder or hub name of transformers, or a timm name,
            optionally with the prefix `timm:`.
        weights: a safetensors file, `none` for random initialization (default: the pretrained weights).
        keep_head: keep the model's head, for methods that map its labels. The head of a CLIP are its class embeddings.
        size: side of the input images (default: the model's own).
        seed: of a new head, and of random weights.
    Raises:
        ModelError: no such model or weights, weights of another architecture, or an unsupported size.
    """
    if is_clip_name(name):
        return open_clip_classifier(name, classes, weights=weights, seed=seed, templates=templates)
    if is_transformers_name(name):
        return transformers_classifier(name, classes, weights=weights, keep_head=keep_head, size=size, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, "model"))
        source = str(base_models.path("bundled_clip")) if name == "bundled" else name.removeprefix("timm:")
        model: Any
        model, origin, arguments = _timm(source, weights, size)
        if not keep_head:
            new_head(model, name, len(classes), seed)
    from timm.data.config import resolve_model_data_config

    data = dict(resolve_model_data_config(model))
    channels, *own = data["input_size"]
    data["input_size"] = (channels, *((size, size) if size is not None else own))
    model.to(memory_format=torch.channels_last)  # convolutions take two thirds of the time
    return Classifier(model.eval().requires_grad_(False), name, data, tuple(classes), origin, not keep_head, arguments)


def _timm(name: str, weights: str | Path | None, size: int | None) -> tuple[nn.Module, str, dict[str, Any]]:
    """The model, the origin of its weights, and the arguments that its architecture depends on."""
    import timm

    source, folder = name, Path(name).is_dir()
    if not folder:
        check_name(name)
    options: dict[str, Any] = {}
    name = f"local-dir:{name}" if folder else name
    if size is not None and _has_img_size(name):
        options["img_size"] = size
    arguments = (_model_args(Path(name.partition(":")[2])) if folder else {}) | options
    if weights == "none":
        return timm.create_model(name, pretrained=False, **options), "random", arguments
    if weights is not None:
        file = check_weights(weights)
        try:
            if not folder:
                options["pretrained_cfg_overlay"] = {"file": str(file)}
            model = timm.create_model(name, pretrained=not folder, **options)
            if folder:
                timm.models.load_checkpoint(model, str(file), strict=True)
            return model, digest_of(file), arguments
        except (RuntimeError, KeyError, ValueError) as error:
            raise ModelError(_mismatch_message(name, file, error), file=file, given="mismatch", expected=name) from error
    with hub(not folder) as why:
        try:
            model = timm.create_model(name, pretrained=True, **options)
            return model, digest_of_folder(Path(source)) if folder else "published", arguments
        except Exception as error:  # the hub's clients raise a dozen kinds
            raise download_error(name, why, error) from error


def _model_args(folder: Path) -> dict[str, Any]:
    """The arguments of the architecture in a folder of timm."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_args") or {})


def _has_img_size(name: str) -> bool:
    """True for models that take `img_size`, because their architecture depends on the input size."""
    import inspect

    import timm

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return "img_size" in inspect.signature(type(model).__init__).parameters


def _mismatch_message(name: str, file: Path, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = " ".join(lines[1:3] if len(lines) > 1 else lines)[:400]
    return f"--weights {file}: not the weights of {name}: {detail} Pass a file of this architecture, or another --model."


def new_head(model: Any, name: str, classes: int, seed: int) -> None:
    """Replaces the model's head with a fresh one, initialized by the seed."""
    if not hasattr(model, "reset_classifier"):
        kind = type(model).__name__
        message = f"{name}: the head of {kind} cannot be replaced; expected a model with reset_classifier."
        raise ModelError(message, where="head", given=kind)
    torch.manual_seed(mix(seed, "head"))
    model.reset_classifier(classes)
    model.requires_grad_(False)
