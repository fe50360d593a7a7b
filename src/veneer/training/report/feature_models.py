"""Feature models of the metrics: unit-norm features of images, and with CLIP also of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from veneer.injection.errors import UnknownName, VeneerError


class Clip(Protocol):
    """Interface of a CLIP: open_clip models and `veneer.base_models.load_clip()`.

    The input of `encode_text` is `tokenizer(texts)`, or the texts if there is no tokenizer.
    """

    def preprocess(self, image: Image.Image) -> Tensor: ...
    def encode_image(self, pixels: Tensor) -> Tensor: ...
    def encode_text(self, text: Any) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """A feature model.

    Args:
        name: label in the results.
        of_pixels: (n, 3, h, w) to (n, width). `preprocess`: an image to (3, h, w).
        of_texts: texts to (n, width), or None without a text encoder (DINO, timm).
        device: device of the model.
    """

    name: str
    preprocess: Callable[[Image.Image], Tensor]
    of_pixels: Callable[[Tensor], Tensor]
    of_texts: Callable[[list[str]], Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image], batch: int = 16) -> Tensor:
        """Unit-norm features of images, (n, width), float32 on the CPU."""
        rows = [self.preprocess(image.convert("RGB")) for image in images]
        chunks = [torch.stack(rows[i : i + batch]).to(self.device) for i in range(0, len(rows), batch)]
        return torch.cat([_unit(self.of_pixels(chunk)) for chunk in chunks])

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor | None:
        """Unit-norm features of texts, or None without a text encoder."""
        return None if self.of_texts is None else _unit(self.of_texts(list(texts)))


def _unit(x: Tensor) -> Tensor:
    return normalize(x.float().cpu(), dim=-1)


def features(model: Any = "bundled", device: str | torch.device = "cpu") -> Features:
    """A feature model from a name, a folder or an object.

    Args:
        model: `bundled` (the bundled CLIP); a folder of timm, open_clip or transformers CLIP (identified by its config); a name
            with its library, such as `timm:vit_small_patch16_224.dino` or `open_clip:ViT-B-32/laion2b_s34b_b79k` or
            `transformers:openai/clip-vit-base-patch32`; an object with the interface of `Clip`; or a `Features`.
        device: device of a loaded model; objects are not moved.
    Raises:
        VeneerError: a name without library, a model that cannot be loaded, or an unsupported folder or object.
    """
    if isinstance(model, Features):
        return model
    if not isinstance(model, (str, Path)):
        return from_clip(model, type(model).__name__)
    if model == "bundled":
        from veneer import base_models

        clip = base_models.load_clip()
        clip.model.to(device)
        return from_clip(clip, "bundled CLIP")
    library, name = _library(model)
    from veneer.hub.connection import hub

    with hub(not Path(name).is_dir()) as why:
        try:
            return LIBRARIES[library](name, torch.device(device))
        except Exception as error:
            if not why:
                raise
            message = f"features: {model} could not be loaded ({why}). Check the connection, or use a folder."
            raise VeneerError(message, where="hub", given=str(model)) from error


def check_features(model: str | Path) -> None:
    """Checks the name of a feature model before a long run; nothing is loaded.

    Raises:
        VeneerError: not `bundled`, a folder of a supported library or a name with its library; or an unknown name.
    """
    if model == "bundled":
        return
    library, name = _library(model)
    if Path(name).is_dir() or ":" in name:
        return
    if library == "timm":
        import timm

        known = timm.is_model(name.partition(".")[0])
    elif library == "open_clip":
        import open_clip

        known = open_clip.get_model_config(name.partition("/")[0]) is not None
    else:
        return
    if not known:
        raise UnknownName(f"features: {library} has no model {name!r}.", name, f"{library} model")


def from_clip(model: Any, name: str) -> Features:
    """Wraps an object with the interface of `Clip`.

    Raises:
        VeneerError: a method is missing.
    """
    missing = [m for m in ("preprocess", "encode_image", "encode_text") if not hasattr(model, m)]
    if missing:
        message = f"features: {name} has no {', '.join(missing)}; expected the interface of open_clip models, with preprocess."
        raise VeneerError(message, where=name, given=tuple(missing))
    tokenize = getattr(model, "tokenizer", None) or getattr(model, "tokenize", None) or (lambda texts: texts)
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    device = _device_of(module)

    def of_texts(texts: list[str]) -> Tensor:
        tokens = tokenize(texts)
        out: Tensor = model.encode_text(tokens.to(device) if isinstance(tokens, Tensor) else tokens)
        return out

    return Features(name, model.preprocess, model.encode_image, of_texts, device)


def _device_of(module: Any) -> torch.device:
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def _open_clip(name: str, device: torch.device) -> Features:
    import open_clip

    folder = Path(name).is_dir()
    architecture, _, weights = (f"local-dir:{name}", "", "") if folder else name.partition("/")
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights or None, device=device)
    tokenizer = open_clip.get_tokenizer(architecture)
    model.eval()
    return Features(
        f"open_clip {Path(name).name if folder else name}",
        preprocess,
        model.encode_image,
        lambda texts: model.encode_text(tokenizer(texts).to(device)),
        device,
    )


def _timm(name: str, device: torch.device) -> Features:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    folder = Path(name).is_dir()
    model = timm.create_model(f"local-dir:{name}" if folder else name, pretrained=True, num_classes=0).eval().to(device)
    preprocess: Any = create_transform(**resolve_model_data_config(model))
    return Features(f"timm {Path(name).name if folder else name}", preprocess, model, None, device)


def _transformers(name: str, device: torch.device) -> Features:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model: Any = CLIPModel.from_pretrained(name)
    model.eval().to(device)
    process, tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    def of_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        return _pooled(model.get_text_features(**tokens))

    return Features(
        f"transformers {Path(name).name if Path(name).is_dir() else name}",
        lambda image: process(image, return_tensors="pt")["pixel_values"][0],
        lambda pixels: _pooled(model.get_image_features(pixel_values=pixels)),
        of_texts,
        device,
    )


def _pooled(out: Any) -> Tensor:
    """Projected features; transformers up to version 4 returns them directly."""
    pooled: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return pooled


LIBRARIES: dict[str, Callable[[str, torch.device], Features]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "transformers": _transformers,
}


def _library(model: str | Path) -> tuple[str, str]:
    library, colon, name = str(model).partition(":")
    if colon and library in LIBRARIES:
        return library, name
    folder = Path(model)
    if (folder / "open_clip_config.json").is_file():
        return "open_clip", str(folder)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "architecture" in config:
            return "timm", str(folder)
        if config.get("model_type") == "clip":
            return "transformers", str(folder)
    raise UnknownName(
        f"features: {str(model)!r} is neither 'bundled', a folder of open_clip, timm or transformers CLIP, nor a name with its "
        f"library: {', '.join(f'{known}:NAME' for known in LIBRARIES)}.",
        str(model),
        "feature model",
        expected=("bundled", *LIBRARIES),
    )
