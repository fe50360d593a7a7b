"""A model that classifies images, and checks of the file that its weights come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from veneer.injection import VeneerError, sites
from veneer.injection.sites import FeatureSite


class ModelError(VeneerError):
    """A model or its weights that cannot be had."""


@dataclass(frozen=True)
class Classifier:
    """A model that gives logits for pictures.

    Args:
        model: in `eval` mode, frozen. `name`: as it was asked for.
        data: how pictures enter it, as timm says it: input_size, mean, std, interpolation, crop_pct, crop_mode.
        classes: names of the classes.
        weights: where its weights are from: `published`, `random`, or a digest of the file.
        fresh: True where its head is new and must be trained.
    """

    model: nn.Module
    name: str
    data: Mapping[str, Any]
    classes: tuple[str, ...]
    weights: str
    fresh: bool

    @property
    def features(self) -> FeatureSite | None:
        """Where the features enter the head; None for a model with several heads."""
        found = [s for s in sites(self.model) if isinstance(s, FeatureSite) and s.role == "features"]
        return found[0] if len(found) == 1 else None


def check_weights(weights: str | Path) -> Path:
    """The file of weights.

    Raises:
        ModelError: it is not there, or is none of safetensors.
    """
    file = Path(weights).expanduser()
    if not file.is_file():
        message = f"--weights {weights}: there is no such file; expected a safetensors file, or the word none."
        raise ModelError(message, file=file, given="missing")
    if file.suffix != ".safetensors":
        raise ModelError(
            f"--weights {file}: only safetensors are read, because other files can run code. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors').",
            file=file,
            where="suffix",
            given=file.suffix,
            expected=".safetensors",
        )
    try:
        with safe_open(file, "pt"):  # the header alone
            pass
    except (SafetensorError, OSError) as error:
        message = f"--weights {file}: no readable safetensors file ({error}). Download it again."
        raise ModelError(message, file=file, given="damaged") from error
    return file


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
