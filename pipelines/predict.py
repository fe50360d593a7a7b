"""Classify images with a trained classifier."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from veneer.base_models.devices import resolve_device
from veneer.classification.image_paths import find_images
from veneer.classification.objectives.objective import MultiLabelPrediction, Prediction
from veneer.classification.predict import open_predictor
from veneer.formats import local_path
from veneer.injection import OptionError, VeneerError, attachments
from veneer.training.attach_methods import skip_lower_layers

__all__ = ["PredictConfig", "predict"]


@dataclass(frozen=True)
class PredictConfig:
    """Configuration of `veneer predict` and its defaults.

    Args:
        folder: run folder of `veneer transfer`, or a hub name such as `user/pets`.
        images: images, folders of images, `.txt` files with one path per line, or `-` for such a list from stdin.
        task: name of a task, required for a run with several (`veneer transfer --tasks`); only its classes are predicted. A
            wrong name lists those of the run.
        top: classes to list per image; after training with `--multi-label` the text lists the labels of at least 50 % instead.
        format: lines on stdout: `text`, `json` (one object per image, unlike `--json`) or `csv` (one row per image, with a
            header).
        batch: images per forward pass.
        device: device such as `cuda` (default: a GPU if there is one).
        exchange: adapters of the run to replace by those of other run folders or files, of the same method and options,
            NAME=FILE, such as `mad_x=runs/sketches` for another domain; a wrong NAME lists those of the run.
        skip_layers: of a run with `adapter_drop`: number of layers, from the first, whose adapters are left out, for faster
            inference (default: as saved).
    """

    folder: Path
    images: tuple[Path, ...] = ()
    task: str | None = None
    top: int = 3
    format: Literal["text", "json", "csv"] = "text"
    batch: int = 32
    device: str | None = None
    exchange: tuple[str, ...] = ()
    skip_layers: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMS:
            message = f"format is {self.format!r}; expected one of {', '.join(FORMS)}."
            raise OptionError(message, option="format", given=self.format, expected=tuple(FORMS))
        for name, given in (("top", self.top), ("batch", self.batch)):
            if given < 1:
                raise OptionError(f"{name} is {given}; expected at least 1.", option=name, given=given, expected=1)
        for text in self.exchange:
            if not all(text.partition("=")):
                raise OptionError(
                    f"exchange is {text!r}; expected NAME=FILE.", option="exchange", given=text, expected="NAME=FILE"
                )


def predict(config: PredictConfig) -> Iterator[str]:
    """Yields one line per image: its most probable classes with probabilities, or why the image cannot be read.

    A classifier of several labels per image lists the labels with a probability of at least 0.5; as CSV in the last column.

    Raises:
        VeneerError: no finished run in the folder, no images, or no readable image.
    """
    images = find_images(config.images)
    if not images:
        message = "no images; pass image files or a folder of images after the run folder."
        raise OptionError(message, option="images", given=())
    folder = local_path(config.folder)
    folder = folder if folder.is_dir() or folder == config.folder else folder.parent  # of a hub name, the adapter file
    pairs = (text.partition("=") for text in config.exchange)
    exchange = {name: local_path(file) for name, _, file in pairs}
    predictor = open_predictor(folder, resolve_device(config.device), exchange, config.task)
    skip_lower_layers(attachments(predictor.classifier.model), config.skip_layers)
    top = min(config.top, len(predictor.classifier.classes))
    if config.format == "csv":
        yield _row(_columns(top, predictor.objective.multiple))
    read = False
    for prediction in predictor.predict(images, top, config.batch):
        read = read or not prediction.problem
        yield FORMS[config.format](prediction, top)
    if not read:
        message = f"none of the {len(images)} images could be read; see the reasons above."
        raise VeneerError(message, where="images", given=tuple(map(str, images)))


def _text(prediction: Prediction, top: int) -> str:
    if prediction.problem:
        return f"{prediction.image}: {prediction.problem}"
    classes: Sequence[tuple[str, float]] = ((prediction.label, prediction.probability), *prediction.others)
    above = prediction.labels if isinstance(prediction, MultiLabelPrediction) else classes
    listing = ", ".join(f"{label} {probability:.1%}" for label, probability in above or classes)
    return f"{prediction.image}: {listing if above else f'no label above 50 %; most probable: {listing}'}"


def _json(prediction: Prediction, top: int) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False)


def _columns(top: int, multiple: bool) -> list[str]:
    others = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "probability")]
    return ["image", "label", "probability", "problem", *others, *(["labels"] if multiple else [])]


def _csv(prediction: Prediction, top: int) -> str:
    probability = "" if prediction.problem else repr(prediction.probability)
    others = [cell for label, value in prediction.others for cell in (label, repr(value))]
    cells = [prediction.image, prediction.label, probability, prediction.problem, *others]
    cells += [""] * (len(_columns(top, False)) - len(cells))
    labels = [";".join(name for name, _ in prediction.labels)] if isinstance(prediction, MultiLabelPrediction) else []
    return _row(cells + labels)


def _row(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


FORMS = {"text": _text, "json": _json, "csv": _csv}
