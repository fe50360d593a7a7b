"""What `veneer transfer` can be told, and what is usual where it is told nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.injection import methods
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.training.loop.config import TrainConfig
from veneer.training.loop.optimizer_step import AUTOCAST
from veneer.training.method_names import split_methods
from veneer.training.report.run_folder import new_folder

WITHOUT_EFFECT = ("data", "model", "weights", "cache", "resume", "check", "out", "workers", "search")
"""Options that a resumed run may change, or that are compared by content."""


@dataclass(frozen=True)
class TransferConfig:
    """What is learnt, from which pictures, by which method on which model.

    Args:
        data: an image folder (`CLASS/pictures`, also below `train`, `validation`, `test`), a CSV of path and label, a Hugging
            Face dataset folder, or `digits`: scikit-learn's, which are what is learnt when nothing is said.
        model: `bundled` (the image tower of the package's CLIP), a timm name, or `bundled_clip` and `open_clip:NAME/TAG` for
            methods that use texts as well.
        weights: a safetensors file for the model, or `none` to begin with random ones; None for the published weights.
        method: a method, or several joined by `+`; see `veneer methods`. `zero_shot` for a CLIP as it is.
        options: method name to its options.
        where: selection of sites; see `veneer sites`. None: each method's usual.
        head: `fresh` for a new linear head that is trained, `kept` for the model's own; None for what the method wants.
        head_first: start a fresh head at the logistic regression on the frozen features, which run once for it. For a few epochs;
            in longer runs a head that learns with the adapters ended better.
        templates: texts for the classes of a CLIP, with {} for the name.
        statistics: of BatchNorms: `frozen` as they are, or `moving` with the pictures; None: moving where the weights are random.
        shots: pictures of each class to train on; None for all.
        validation: share of the pictures that chooses the epoch, where the data brings no such split.
        test: share of the pictures for the last figure, where the data brings no such split.
        split_seed: of the splits that are made here.
        steps: optimiser steps; None to count in epochs.
        epochs: passes over the training pictures.
        batch: pictures in a micro-batch, over all processes.
        accumulation: micro-batches in a step.
        learning_rate: peak rate of the first method, and of a new head beside it; None for its usual. Others keep their ratio.
        schedule: `cosine`, `constant` or `linear`.
        warmup: share of the steps in which the rate rises.
        optimizer: `adamw`, `adamw8bit`, `prodigy`, `sgd` or `adafactor`.
        weight_decay: decoupled weight decay.
        clip: largest norm of the gradient; 0 for no clipping.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        augment: `none`, `light` (random crop), `flip` (mirrored too, where the data allows it) or `strong` (RandAugment and
            erasing as well).
        squash: resize to the exact side without a crop, as VTAB does.
        size: side of the pictures in pixels; None for the model's own.
        precision: `no` (float32), `bf16` or `fp16` autocast.
        patience: epochs without a better validation accuracy before the run ends; 0 for never.
        search: trials of learning rate and scale on the validation pictures before the run; 0 for none.
        search_epochs: passes over the training pictures in each trial.
        cache: run the backbone once for each picture where only the head and features are trained.
        seed: of every random draw.
        resume: go on from the newest checkpoint in `out`.
        check: only say what would be trained, and stop.
        workers: threads that read pictures; 0 for as many as there are cores.
        tracker: names that accelerate knows, separated by commas, or `none`.
        out: folder for all results; None for a new one under `runs`.
    """

    data: str | None = None
    model: str = "bundled"
    weights: str | None = None
    method: str = "lora"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    where: tuple[str, ...] | None = None
    head: str | None = None
    head_first: bool = False
    templates: tuple[str, ...] = ("a photo of a {}.",)
    statistics: str | None = None
    shots: int | None = None
    validation: float = 0.1
    test: float = 0.15
    split_seed: int = 0
    steps: int | None = None
    epochs: int = 20
    batch: int = 32
    accumulation: int = 1
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    clip: float = 1.0
    label_smoothing: float = 0.0
    augment: str = "flip"
    squash: bool = False
    size: int | None = None
    precision: str = "no"
    patience: int = 0
    search: int = 0
    search_epochs: int = 3
    cache: bool = True
    seed: int = 0
    resume: bool = False
    check: bool = False
    workers: int = 0
    tracker: str = "none"
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch", 1),
            ("accumulation", 1),
            ("patience", 0),
            ("search", 0),
            ("search_epochs", 1),
            ("workers", 0),
        ):
            self._check(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("validation", "test", "warmup", "label_smoothing"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("shots", self.shots is None or self.shots >= 1, "at least 1")
        self._check("steps", self.steps is None or self.steps >= 1, "at least 1")
        self._check("learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "finite and above 0")
        self._check("head", self.head in (None, "fresh", "kept"), "fresh or kept")
        self._check("statistics", self.statistics in (None, "frozen", "moving"), "frozen or moving")
        self._check("size", self.size is None or self.size >= 8, "at least 8")
        self._check("precision", self.precision in AUTOCAST, f"one of {', '.join(AUTOCAST)}")
        self._check("augment", self.augment in ("none", "light", "flip", "strong"), "none, light, flip or strong")
        self._check("templates", all("{}" in t for t in self.templates), "texts with {} in them")

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            given = getattr(self, name)
            raise OptionError(f"{name} is {given!r}; expected {expected}.", option=name, given=given, expected=expected)

    def completed(self) -> TransferConfig:
        """The same with a folder for the results."""
        word = Path(self.data).name if self.data else "digits"
        return self if self.out else dataclasses.replace(self, out=new_folder(Path("runs"), f"{word}-{self.method}"))

    def built(self, classes: int = 0, shots: int = 0) -> list[Method]:
        """The configs of the methods.

        Args:
            classes, shots: how many classes there are, and most training pictures of one, for methods that have such options and
                were not told.
        Raises:
            VeneerError: options for a method that is not trained. UnknownName: no such method.
        """
        names = self.names()
        stray = sorted(set(self.options) - set(names))
        if stray:
            message = f"options for {', '.join(stray)}, but the run trains {', '.join(names)}."
            raise OptionError(message, option="options", given=tuple(stray), expected=tuple(names))
        return [methods.get(name).from_config(self._told(name, classes=classes, shots=shots)) for name in names]

    def _told(self, name: str, **seen: int) -> dict[str, Any]:
        """A method's options, and of what was seen in the data those that it has."""
        known = {f.name for f in dataclasses.fields(methods.get(name))}
        return {**{k: v for k, v in seen.items() if v and k in known}, **self.options.get(name, {})}

    def keeps_head(self) -> bool:
        """True where the model's own head stays as it is."""
        wanted = [methods.get(name).keeps_head for name in self.names()]
        return self.head == "kept" if self.head else any(wanted)

    def rate(self) -> float:
        """The peak learning rate."""
        usual = next((methods.get(name).learning_rate for name in self.names()), 1e-3)
        return usual if self.learning_rate is None else self.learning_rate

    def names(self) -> list[str]:
        """Names of the methods; none for `zero_shot`, a CLIP as it is."""
        return [] if self.method == "zero_shot" else split_methods(self.method)

    def loop(self, per_epoch: int, steps: int) -> TrainConfig:
        """The loop's part: a checkpoint and a look at the validation pictures after every epoch."""
        names = {f.name for f in dataclasses.fields(TrainConfig)} & {f.name for f in dataclasses.fields(self)}
        shared = {name: getattr(self, name) for name in names - {"learning_rate", "warmup", "steps"}}
        return TrainConfig(
            steps=steps,
            learning_rate=self.rate(),
            warmup=round(self.warmup * steps),
            checkpoint_every=per_epoch,
            preview_every=per_epoch,
            **shared,
        )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share beyond the loop's settings and the pictures' bytes."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in WITHOUT_EFFECT and not hasattr(TrainConfig, k)}
        return dict(json.loads(json.dumps(fields, default=str, sort_keys=True)))
