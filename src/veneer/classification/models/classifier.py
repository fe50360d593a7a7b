"""A classifier with its metadata, and checks of weights files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from veneer.injection import VeneerError, sites
from veneer.injection.sites import FeatureSite

WITHOUT_HASH = ("random", "published")
"""Origins of weights that are no hash of a file."""


class ModelError(VeneerError):
    """A model or its weights cannot be loaded."""


def download_error(name: str, offline: str, error: Exception) -> ModelError:
    """The error of pretrained weights that could not be downloaded. `offline`: why the hub cannot be reached, or ""."""
    message = (
        f"{name}: the pretrained weights could not be downloaded ({offline or type(error).__name__}). Check the connection, "
        "or pass --weights FILE.safetensors, or --weights none for random initialization."
    )
    return ModelError(message, where="hub", given=name)


@dataclass(frozen=True)
class Classifier:
    """A frozen image classifier with its metadata.

    Args:
        model: in `eval` mode, frozen. `name`: the name it was opened by.
        data: timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode.
        classes: names of the classes.
        weights: origin of the weights: `published`, `random`, or the SHA-256 of the file, also of one in a folder.
        fresh: True if its head is new and must be trained.
        arguments: arguments of `timm.create_model` that its architecture depends on, beside the number of classes.
    """

    model: nn.Module
    name: str
    data: Mapping[str, Any]
    classes: tuple[str, ...]
    weights: str
    fresh: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str]:
        """What a resumed run must share: the weights by their hash, or by their origin and the name of the model."""
        return {"weights": self.weights} | ({"model": self.name} if self.weights in WITHOUT_HASH else {})

    @property
    def features(self) -> FeatureSite | None:
        """The site of the head's input features; None if the model has several heads."""
        found = [s for s in sites(self.model) if isinstance(s, FeatureSite) and s.role == "features"]
        return found[0] if len(found) == 1 else None


def check_weights(weights: str | Path) -> Path:
    """Path of a weights file, checked.

    Raises:
        ModelError: the file does not exist, or is no valid safetensors file.
    """
    file = Path(weights).expanduser()
    if not file.is_file():
        message = f"--weights {weights}: no such file; expected a safetensors file, or none for random initialization."
        raise ModelError(message, file=file, given="missing")
    if file.suffix != ".safetensors":
        raise ModelError(
            f"--weights {file}: expected a safetensors file, because pickles can run code. If you trust the file, convert it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors').",
            file=file,
            where="suffix",
            given=file.suffix,
            expected=".safetensors",
        )
    try:
        with safe_open(file, "pt"):  # reads the header only
            pass
    except (SafetensorError, OSError) as error:
        message = f"--weights {file}: not a valid safetensors file ({error}). Download it again."
        raise ModelError(message, file=file, given="damaged") from error
    return file


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """SHA-256 of the safetensors files in a folder: of the file, or of the digests of several."""
    digests = [digest_of(file) for file in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
