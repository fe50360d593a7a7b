"""Loading of a classifier that `veneer transfer` trained, and prediction on image files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.base_models import current_name
from veneer.formats import load_all
from veneer.injection import OptionError, VeneerError, attachments
from veneer.injection.composition.activation import find_attachment
from veneer.injection.composition.current_task import task_index
from veneer.training.data.image_io import DataError, decode
from veneer.training.fixed_adapters import restore_strengths
from veneer.training.loop.optimizer_step import AUTOCAST

from .data.labeled_images import LIMITS
from .data.transforms import EvalView
from .models.classifier import Classifier
from .models.loading import open_classifier
from .objectives.multi_label import objective_of
from .objectives.objective import Objective, Prediction
from .objectives.single_label import SINGLE_LABEL
from .report.artifacts import FORM
from .tasks.task import rows_of

__all__ = ["Prediction", "Predictor", "open_predictor"]


@dataclass(frozen=True)
class Predictor:
    """A trained classifier.

    Args:
        view: its evaluation transform. `dtype`: of autocast, or None. `objective`: of its training.
        rows: columns of the model's logits that are the classes; all without several tasks.
    """

    classifier: Classifier
    view: EvalView
    dtype: torch.dtype | None
    objective: Objective = SINGLE_LABEL
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.classifier.model.parameters()).device

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Logits (n, classes) of pixels (n, 3, height, width), float32."""
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype is not None):
            logits: Tensor = self.classifier.model(pixels)
        return logits[:, self.rows].float()

    def predict(self, images: Sequence[Path], top: int = 3, batch: int = 32) -> Iterator[Prediction]:
        """Predictions for image files, in order; an unreadable image gets `problem` instead of a label.

        Args:
            top: classes reported for each image. `batch`: images per forward pass.
        """
        for start in range(0, len(images), batch):
            inputs = [self._read(path) for path in images[start : start + batch]]
            pixels = [each for each in inputs if isinstance(each, Tensor)]
            probabilities = iter(self._probabilities(torch.stack(pixels)) if pixels else ())
            for path, each in zip(images[start : start + batch], inputs, strict=True):
                if isinstance(each, str):
                    yield Prediction(str(path), problem=each)
                else:
                    yield self.objective.prediction(str(path), next(probabilities), self.classifier.classes, top)

    def _probabilities(self, pixels: Tensor) -> Tensor:
        return self.objective.probabilities(self.logits(pixels.to(self.device))).cpu()

    def _read(self, path: Path) -> Tensor | str:
        try:
            return self.view(decode(path.read_bytes(), path.name, LIMITS, remarks=False).rgb)
        except (DataError, OSError) as error:
            return str(error)


def open_predictor(
    folder: Path, device: str = "cpu", exchange: Mapping[str, Path] | None = None, task: str | None = None
) -> Predictor:
    """Loads the classifier in a folder of `veneer transfer`.

    Args:
        device: device of the model, such as `cuda`.
        exchange: names of attachments and the files whose adapters replace theirs.
        task: the task of a run with several.
    Raises:
        UnknownName: the run has no attachment of a name in `exchange`. LoadError: a file there does not match it.
        VeneerError: no finished run in the folder, or the model's weights are missing or have changed.
        OptionError: a run with several tasks without `task`, or one without tasks with it. UnknownName: no such task.
    """
    file = folder / "model.json"
    if not file.is_file():
        stopped = (
            "the run is not finished; finish it with `veneer transfer --resume`" if (folder / "splits.json").is_file() else ""
        )
        message = f"{folder}: no model.json: {stopped or 'expected a folder that `veneer transfer --out` has written'}."
        raise VeneerError(message, file=folder, where="model.json", given="missing")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if record.get("form") != FORM:
        message = f"{file}: format version {record.get('form')!r}; expected {FORM}. Use the veneer version that wrote it."
        raise VeneerError(message, file=file, where="form", given=record.get("form"), expected=FORM)
    index = _task_of(folder, record.get("tasks", ()), task)
    weights = record["weights"]
    if weights not in (None, "none") and not Path(weights).is_file():
        raise VeneerError(
            f"{file}: the file of the model's weights, {weights}, is missing. Restore it, or enter its new path under `weights`.",
            file=weights,
            where="weights",
            given="missing",
        )
    classifier = open_classifier(
        current_name(record["model"]), record["classes"], weights=weights, keep_head=not record["fresh_head"],
        size=record["size"], seed=record["seed"], templates=record["templates"],
    )  # fmt: skip
    if record["weights_digest"] not in (classifier.weights, "published"):  # not the hash, in records of earlier versions
        origin = weights or record["model"]
        message = f"{origin}: not the weights that {folder} was trained on: the SHA-256 differs. Restore the original file."
        digests = {"given": classifier.weights, "expected": record["weights_digest"]}
        raise VeneerError(message, file=origin, where="weights", **digests)
    attached = load_all(classifier.model, folder / "adapter.safetensors") if record["adapted"] else []
    restore_strengths(attached)
    loaded = {a.name: a for a in attached}
    for name, path in (exchange or {}).items():
        find_attachment(loaded, name).swap(path)
    classifier.model.eval().to(device)
    view, objective = EvalView(classifier.data, squash=record["squash"]), objective_of(record.get("multi_label", False))
    predictor = Predictor(classifier, view, AUTOCAST[record["precision"]], objective)
    return predictor if index is None else _for_task(predictor, record["tasks"], index)


def _task_of(folder: Path, tasks: Sequence[Mapping[str, Any]], task: str | None) -> int | None:
    """Index of the task; None for a run without several tasks."""
    names = tuple(entry["name"] for entry in tasks)
    if names and task is None:
        message = f"{folder}: the run has {len(names)} tasks; choose one of {', '.join(names)} with --task."
        raise OptionError(message, option="task", file=folder, given=None, expected=names)
    if not names and task is not None:
        message = f"{folder}: the run has a single task; leave out --task {task}."
        raise OptionError(message, option="task", file=folder, given=task, expected=None)
    return None if task is None else task_index(task, names, str(folder))


def _for_task(predictor: Predictor, tasks: Sequence[Mapping[str, Any]], index: int) -> Predictor:
    """The predictor of one task: its adapters, its rows of the head and its classes."""
    for attachment in attachments(predictor.classifier.model):
        attachment.task = tasks[index]["name"]
    classifier = replace(predictor.classifier, classes=tuple(tasks[index]["classes"]))
    return replace(predictor, classifier=classifier, rows=rows_of(tasks, index))
