"""Loads a vision model of transformers as a classifier with a linear head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.extras import quiet_transformers, require
from veneer.hub.connection import hub
from veneer.hub.names import parse_name
from veneer.injection import sites
from veneer.injection.registry import host_of
from veneer.injection.sites import PixelSite
from veneer.models.image_classifier import ImageClassifier, pooling_of
from veneer.training.loop.seeds import mix

from .classifier import Classifier, ModelError, digest_of_folder
from .image_processors import data_config

PREFIX = "hf:"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TYPES = (
    "beit", "clip", "clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "siglip_vision_model",
    "swin", "vit",
)  # fmt: skip
"""Model types of transformers with an image tower."""
KEPT_HEADS = ("vit", "deit", "dinov2", "dinov2_with_registers", "swin", "beit")
"""Model types whose own classifier reads the features of `ImageClassifier`."""


class ModelLocation(NamedTuple):
    """Where a model is loaded from: a folder, or a repository of the hub and its revision. `name`: as in `--model`."""

    name: str
    path: str
    revision: str | None
    is_local: bool


def is_transformers_name(name: str) -> bool:
    """True for names of transformers' models: `hf:FOLDER` or `hf:USER/REPO`."""
    return name.startswith(PREFIX)


def check_transformers_name(name: str) -> None:
    """Checks a name without a connection: of a folder its configs, of a hub name the form.

    Raises:
        ModelError: no such folder, a folder without the config of a model or of an image processor, or no supported image tower.
    """
    source = _source(name)
    if source.is_local:
        transformers_outline(name)
        _require_file(source, PROCESSORS)


def _source(name: str) -> ModelLocation:
    text = name.removeprefix(PREFIX)
    folder = Path(text).expanduser()
    if folder.is_dir():
        source = ModelLocation(f"{PREFIX}{folder.resolve()}", str(folder.resolve()), None, True)
        _require_file(source, ("config.json",))
        return source
    parsed = parse_name(text)
    if parsed is None or parsed.file is not None:
        message = f"{name}: no such folder; expected hf:FOLDER with a model of transformers, or hf:USER/REPO of the hub."
        raise ModelError(message, where="folder", given=text, expected=("hf:FOLDER", "hf:USER/REPO"))
    return ModelLocation(name, parsed.repo, parsed.revision, False)


def _require_file(source: ModelLocation, names: tuple[str, ...]) -> None:
    """Raises an error if a folder has none of these files."""
    folder = Path(source.path)
    if source.is_local and not any((folder / name).is_file() for name in names):
        message = f"{source.name}: no {names[0]}; expected a folder with the files of a model and of its image processor."
        raise ModelError(message, file=folder / names[0], where=names[0], given="missing")


def transformers_classifier(
    name: str,
    classes: Sequence[str],
    *,
    weights: str | Path | None = None,
    keep_head: bool = False,
    size: int | None = None,
    seed: int = 0,
) -> Classifier:
    """Builds a classifier on a vision model of transformers, with the preprocessing of its image processor.

    The features of the head are described in `ImageClassifier`: class token, mean, or SigLIP's attention pooling.

    Args:
        name: `hf:FOLDER` or `hf:USER/REPO`; of a model with text, such as CLIP, the image tower is used.
        weights: `none` for random weights (default: the published weights, from safetensors files only).
        keep_head: keep the model's own classifier.
        size: side of the images in pixels, a multiple of the patch size (default: the image processor's).
        seed: of a new head, and of random weights.
    Raises:
        ModelError: unknown folder or name, a model without a supported image tower, incomplete weights, a head to keep
            of random weights, or an unsupported size.
    """
    require("transformers")
    source = _source(name)
    if weights not in (None, "none"):
        message = f"--weights {weights}: models of transformers are loaded from their folder; put the file there, or pass none."
        raise ModelError(message, where="weights", given=str(weights), expected=("none",))
    if weights == "none" and keep_head:
        message = f"{name}: its own head is kept, but the weights are random. Leave out --weights none, or pass --head fresh."
        raise ModelError(message, where="head", given="none", expected="published")
    with torch.random.fork_rng(devices=[]), quiet_transformers(), hub(not source.is_local) as why:
        config = _config(source, why)
        _checked(name, _outline(config, name))
        data = _with_size(data_config(_image_processor(source, why), name), size)
        torch.manual_seed(mix(seed, "model"))
        backbone, head = (_build(config, name), None) if weights == "none" else _load(source, config, why, keep_head)
        model = _classifier(name, backbone, data, len(classes), seed)
        if head is not None:
            model.head = head
    origin = "random" if weights == "none" else digest_of_folder(Path(source.path)) if source.is_local else "published"
    return Classifier(model.eval().requires_grad_(False), source.name, data, tuple(classes), origin, head is None)


def transformers_outline(name: str) -> nn.Module:
    """The image tower of a model of transformers without weights, to inspect its structure.

    Raises:
        ModelError: as `transformers_classifier`.
    """
    require("transformers")
    source = _source(name)
    with quiet_transformers(), hub(not source.is_local) as why:
        return _checked(name, _outline(_config(source, why), name))


def _classifier(name: str, backbone: Any, data: dict[str, Any], classes: int, seed: int) -> ImageClassifier:
    """The model with a new head, for the size of the images in `data`."""
    height, width = data["input_size"][1:]
    config = backbone.config
    if height % config.patch_size or width % config.patch_size:
        message = f"{name}: images of {height}×{width} pixels, but patches of {config.patch_size}; expected a multiple of it."
        raise ModelError(message, where="size", given=(height, width), expected=config.patch_size)
    own = config.image_size if isinstance(config.image_size, int) else tuple(config.image_size)
    interpolates = own not in (height, (height, width)) or height != width
    accepted = "interpolate_pos_encoding" in inspect.signature(type(backbone).forward).parameters
    options = {"interpolate_pos_encoding": True} if interpolates and accepted else {}
    torch.manual_seed(mix(seed, "head"))
    return ImageClassifier(backbone, classes, (height, width), data["mean"], data["std"], **options)


def _config(source: ModelLocation, why: str) -> Any:
    """The config of the model's image tower, or of the whole model if it has no other part."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.path, **_arguments(source, why))
    except (ValueError, KeyError) as error:
        message = f"{source.name}: transformers cannot read its config.json ({_first_line(error)}). Expected an image model."
        raise ModelError(message, where="config.json", given="unknown", expected="image model") from error
    except OSError as error:
        reason = why or _first_line(error)
        message = f"{source.name}: the config could not be loaded ({reason}). Check name and connection, or use hf:FOLDER."
        raise ModelError(message, where="hub", given=source.name) from error


def _image_processor(source: ModelLocation, why: str) -> Any:
    from transformers import AutoImageProcessor

    _require_file(source, PROCESSORS)
    try:
        return AutoImageProcessor.from_pretrained(source.path, **_arguments(source, why))
    except (OSError, ValueError, KeyError) as error:
        message = (
            f"{source.name}: no image processor in preprocessor_config.json ({_first_line(error)}). Expected an image model."
        )
        raise ModelError(message, where="preprocessor_config.json", given="unreadable", expected="image processor") from error


def _arguments(source: ModelLocation, why: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`: no code of a repository, and no connection if there is none."""
    local = source.is_local or bool(why)
    return {"trust_remote_code": False, "local_files_only": local, "revision": source.revision or "main"}


def _build(config: Any, name: str) -> nn.Module:
    """The image tower with random weights."""
    from transformers import AutoModel

    vision = getattr(config, "vision_config", config)
    try:
        model: nn.Module = AutoModel.from_config(vision, **_options(vision))
    except (ValueError, TypeError) as error:
        raise _unsupported(config.model_type, name) from error
    return model


def _load(source: ModelLocation, config: Any, why: str, keep_head: bool) -> tuple[nn.Module, nn.Module | None]:
    """The image tower, and the classifier that is kept."""
    import transformers

    vision = getattr(config, "vision_config", config)
    if keep_head and config.model_type not in KEPT_HEADS:
        message = f"{source.name}: the head of {config.model_type} cannot be kept, only those of {', '.join(KEPT_HEADS)}."
        raise ModelError(message, where="head", given=config.model_type, expected=KEPT_HEADS)
    kind = "AutoModelForImageClassification" if keep_head else "AutoModel"
    options = {} if keep_head or vision is not config else _options(vision)
    try:
        model, report = getattr(transformers, kind).from_pretrained(
            source.path, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **_arguments(source, why), **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        message = f"{source.name}: its weights cannot be loaded ({_first_line(error)}). Expected safetensors files of this model."
        raise ModelError(message, where="weights", given="unreadable", expected=".safetensors") from error
    missing = sorted(key for key in report["missing_keys"] if "mask_token" not in key)
    if missing:
        message = f"{source.name}: its weights lack {', '.join(missing[:3])}; expected all parameters of {type(model).__name__}."
        raise ModelError(message, where="weights", given=tuple(missing), expected=type(model).__name__)
    if keep_head:
        return model.base_model, model.classifier
    return (model if vision is config else model.vision_model), None


def _outline(config: Any, name: str) -> nn.Module:
    with torch.device("meta"):
        return _build(config, name)


def _checked(name: str, model: nn.Module) -> nn.Module:
    """The model, if a host describes it and its input is an image.

    Raises:
        ModelError: it is no supported image tower.
    """
    if host_of(model) is None or not any(isinstance(site, PixelSite) for site in sites(model)):
        config: Any = model.config
        raise _unsupported(config.model_type, name)
    return model


def _unsupported(kind: str, name: str) -> ModelError:
    message = f"{name}: a model of the type {kind!r} has no image tower that is supported; expected one of {', '.join(TYPES)}."
    return ModelError(message, where="model_type", given=kind, expected=TYPES)


def _options(config: Any) -> dict[str, Any]:
    """Arguments of the model's class: without a pooler that the classifier does not read."""
    return {"add_pooling_layer": False} if pooling_of(config) == "class" else {}


def _with_size(data: dict[str, Any], size: int | None) -> dict[str, Any]:
    return data if size is None else {**data, "input_size": (3, size, size)}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
