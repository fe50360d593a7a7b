"""Opening what `veneer transfer` left, and asking it about pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.base_models import current_name
from veneer.formats import load
from veneer.injection import VeneerError
from veneer.training.data.image_io import DataError, decode
from veneer.training.loop.optimizer_step import AUTOCAST

from .data.labeled_images import LIMITS
from .data.transforms import EvalView
from .models.classifier import Classifier
from .models.loading import open_classifier
from .report.artifacts import FORM

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Answer:
    """What was answered about a picture.

    Args:
        picture: its path. `label`, `probability`: of the first class.
        others: the classes after it, with their probabilities.
        problem: why there is no answer, or "".
    """

    picture: str
    label: str = ""
    probability: float = 0.0
    others: tuple[tuple[str, float], ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Predictor:
    """A taught classifier. `view`: pictures as it takes them. `dtype`: of autocast, or None."""

    classifier: Classifier
    view: EvalView
    dtype: torch.dtype | None

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """(n, classes) for (n, 3, height, width), float32."""
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype is not None):
            found: Tensor = self.classifier.model(pixels)
        return found.float()

    def answers(self, pictures: Sequence[Path], most: int = 3, batch: int = 32) -> Iterator[Answer]:
        """An answer for each picture, in order; one that cannot be read gets its problem.

        Args:
            most: classes told of each picture. `batch`: pictures a pass.
        """
        for start in range(0, len(pictures), batch):
            some = [self._read(path) for path in pictures[start : start + batch]]
            pixels = [found for found in some if isinstance(found, Tensor)]
            shares = iter(self.logits(torch.stack(pixels)).softmax(1) if pixels else ())
            for path, found in zip(pictures[start : start + batch], some, strict=True):
                if isinstance(found, str):
                    yield Answer(str(path), problem=found)
                else:
                    yield self._answer(path, next(shares), most)

    def _read(self, path: Path) -> Tensor | str:
        try:
            return self.view(decode(path.read_bytes(), path.name, LIMITS, remarks=False).rgb)
        except (DataError, OSError) as error:
            return str(error)

    def _answer(self, path: Path, shares: Tensor, most: int) -> Answer:
        top = shares.topk(min(most, len(shares)))
        named = [(self.classifier.classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        return Answer(str(path), *named[0], others=tuple(named[1:]))


def open_predictor(folder: Path) -> Predictor:
    """The classifier in a folder of `veneer transfer`.

    Raises:
        VeneerError: no finished run there, or the model's weights are gone or others.
    """
    file = folder / "model.json"
    if not file.is_file():
        more = "its run was stopped; finish it with `veneer transfer --resume`" if (folder / "splits.json").is_file() else ""
        message = f"{folder}: no model.json: {more or 'expected a folder that `veneer transfer --out` has written'}."
        raise VeneerError(message, file=folder, where="model.json", given="missing")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if record.get("form") != FORM:
        message = f"{file}: form {record.get('form')!r}; this version reads {FORM}. Use the version that wrote it."
        raise VeneerError(message, file=file, where="form", given=record.get("form"), expected=FORM)
    weights = record["weights"]
    if weights not in (None, "none") and not Path(weights).is_file():
        raise VeneerError(
            f"{file}: the model's weights were {weights}, which is gone. Put the file back, or write its place there.",
            file=weights,
            where="weights",
            given="missing",
        )
    classifier = open_classifier(
        current_name(record["model"]), record["classes"], weights=weights, keep_head=not record["fresh_head"],
        size=record["size"], seed=record["seed"], templates=record["templates"],
    )  # fmt: skip
    if classifier.weights != record["weights_digest"]:
        message = f"{weights}: other weights than those that {folder} was trained on. Put the same file in its place."
        digests = {"given": classifier.weights, "expected": record["weights_digest"]}
        raise VeneerError(message, file=weights, where="weights", **digests)
    if record["adapted"]:
        load(classifier.model, folder / "adapter.safetensors")
    classifier.model.eval()
    return Predictor(classifier, EvalView(classifier.data, squash=record["squash"]), AUTOCAST[record["precision"]])


def find(images: Sequence[Path]) -> list[Path]:
    """Pictures, and those in folders, in order of their names.

    Raises:
        VeneerError: nothing at a path, or a folder without pictures.
    """
    found: list[Path] = []
    for image in images:
        if image.is_dir():
            inside = sorted(p for p in image.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
            if not inside:
                raise VeneerError(f"{image}: no image in this folder; expected files such as .jpg or .png.", file=image, given=())
            found += inside
        elif image.exists():
            found.append(image)
        else:
            raise VeneerError(f"{image}: there is no such file or folder.", file=image, given="missing")
    return found
