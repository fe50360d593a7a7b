"""Configuration of `veneer transfer`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from veneer.base_models.devices import Precision
from veneer.injection import methods
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.training.loop.config import TrainConfig, loop_config, run_identity
from veneer.training.loop.optimizer_step import AUTOCAST
from veneer.training.method_names import split_methods
from veneer.training.report.run_folder import new_folder
from veneer.training.training_options import BY_CONTENT, MethodSiteOptions, TrainingOptions

from .data.transforms import Augmentation
from .data.unlabeled import check_unlabeled
from .objectives.support import check_support
from .tasks.options import check_task_options
from .tasks.task import task_sources

WITHOUT_EFFECT = (*BY_CONTENT, "data", "more_data", "model", "weights", "cache", "resume", "dry_run", "out", "workers", "search")
"""Options that a resumed run may change, or that are compared by content."""

SOLVED_HEAD_RATE = 1e-3
"""Highest default learning rate of a head that is initialized with a logistic regression."""


@dataclass(frozen=True)
class TransferConfig(TrainingOptions, MethodSiteOptions):
    """Configuration of `veneer transfer` and its defaults.

    Args:
        data: image folder (`CLASS/IMAGE`, or `train/CLASS/IMAGE` and so on), a CSV of path, label and optionally split, a
            dataset of Hugging Face (folder or hub name) with such files, or `digits` of scikit-learn (default: digits).
        more_data: data sets of the further tasks, one or more, with `tasks`.
        tasks: several tasks in one run: each data set is one, named as its folder or by `NAME=DATA`, with its own splits and head
            on the same model; the mean validation score selects the epoch. Not with `multi_label`, `search` or class embeddings.
        task_temperature: T, above 0, with `tasks`: the probability of a task in a step is proportional to its number of training
            images to the power of 1/T; 1 samples in proportion to the images, a high T all tasks equally.
        multi_label: images may have several labels, separated by `;` or `|` in the label column of a table or in a JSON list; one
            sigmoid per class, selection by mean average precision.
        model: a timm name or folder, `hf:` and a folder or hub name of a vision model of transformers, such as
            `hf:facebook/dinov2-base`, `bundled` (the image encoder of the bundled CLIP), or for methods that use class names,
            such as `coop`, `bundled_clip` or `open_clip:NAME/TAG`, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`.
        weights: a .safetensors file for the model, or `none` for random weights (default: the published weights).
        method: a method of `veneer methods`, several joined by `+`, or `zero_shot` for a CLIP without training; `linear_probe`
            trains the head only, `full` all weights; `--method NAME --help` shows its options.
        options: method name to its options.
        with_: adapter files or run folders, FILE or FILE:STRENGTH, of the same model and any methods, that the run trains on top
            of; they stay fixed, without their heads, and are saved with it.
        head: `fresh` for a new linear head that is trained, `kept` for the model's own head (default: what the method needs).
        lp_ft: LP-FT: initialize a new head with a logistic regression on the frozen features, then fine-tune; best in short
            runs.
        templates: prompt templates of a CLIP, with {} for the class name; their embeddings are averaged.
        batch_norm: BatchNorm statistics: `frozen`, or `moving` to update them in training (default: moving with random weights,
            else frozen).
        shots: training images per class (default: all).
        unlabeled: images without labels, which `pet` and `ppt` need: an image, a folder, or a list of paths.
        validation: share of the images for the validation split, which selects the epoch, 0 to 1; not used if the data has one.
        test: share of the images for the test split, which is evaluated at the end, 0 to 1; not used if the data has one.
        split_seed: seed of the validation and test splits.
        steps: optimizer steps, instead of `epochs`.
        epochs: passes over the training images.
        batch: images per micro-batch, in total over all processes.
        gradient_accumulation_steps: micro-batches per optimizer step.
        learning_rate: peak learning rate of the first method, and of a new head beside it (default: the method's, such as 0.001
            for lora). Other methods keep their ratio to it; it does not scale with the batch.
        head_learning_rate: peak learning rate of a new head beside the methods (default: `learning_rate`; with `lp_ft` at most
            0.001, because the head is already solved, and a higher rate of the method would move it away first).
        layer_decay: layer-wise learning-rate decay, such as 0.75, above 0 to 1: the learning rate of block d, 0 to D - 1, is the
            peak times layer_decay^(D - d), with d = -1 for the embedding or stem and D for the last norm and the head; 1: none.
        schedule: learning-rate schedule: `constant`, `cosine`, `cosine_with_restarts`, `linear`, `polynomial` or `rex`.
        warmup: share of the steps with linear warmup before the schedule, 0 to 1.
        weight_decay: decoupled weight decay of all trained parameters.
        label_smoothing: share of the target that is spread over all classes, or over both outcomes of each of several labels,
            0 to 1.
        class_weights: weights of the classes in the loss: `none`, or `balanced`, in inverse proportion to their training images;
            with several labels the images without a label per image with it, as weight of the latter.
        mixup: alpha of mixup, typically 0.2; 0 disables it.
        cutmix: alpha of CutMix, typically 1; 0 disables it. With both, each pair of images gets one of them.
        ema: decay of an exponential moving average of the trained weights, such as 0.999; the average is evaluated and saved; 0
            disables it.
        augment: `none`, `light` (random crop), `flip` (also horizontal flips, except of `digits`) or `strong` (also RandAugment
            and random erasing).
        squash: resize to a square that ignores the aspect ratio, without a crop, as VTAB does.
        size: side of the images in pixels (default: the model's).
        mixed_precision: autocast of the forward pass to this dtype; `no` disables it.
        patience: early stopping after this many epochs without a better validation metric; 0 disables it.
        search: candidates of the search for learning rate and adapter scale, by successive halving on the validation
            split; 7 are rates of three decades; 0 disables it.
        search_epochs: passes over the training images per candidate; this budget is shared by all rounds of the search.
        keep_epoch: epoch whose weights are evaluated and saved: `best` by validation accuracy (with several labels mean average
            precision), from the last pruning on if the method prunes, or `last`.
        cache: compute the features of each image once, without augmentation, if only the head and methods on features are
            trained; not with mixup or CutMix.
        seed: seed of all random numbers.
        resume: continue after the last complete epoch in `out`.
        dry_run: load the model, print what would be trained, and stop.
        workers: threads that read images; 0 uses one per core.
        tracker: logger of loss and metrics: `tensorboard` (in `logs` of the run folder), `wandb`, `comet_ml`, `mlflow` or
            others of accelerate, several with commas, or `none`; without its package it is skipped.
        out: run folder, for all results (default: a new one under `runs`).
    """

    data: str | None = None
    more_data: tuple[str, ...] = ()
    tasks: bool = False
    task_temperature: float = 10.0
    multi_label: bool = False
    model: str = "bundled"
    weights: str | None = None
    method: str = "lora"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    with_: tuple[str, ...] = ()
    head: Literal["fresh", "kept"] | None = None
    lp_ft: bool = False
    templates: tuple[str, ...] = ("a photo of a {}.",)
    batch_norm: Literal["frozen", "moving"] | None = None
    shots: int | None = None
    unlabeled: Path | None = None
    validation: float = 0.1
    test: float = 0.15
    split_seed: int = 0
    steps: int | None = None
    epochs: int = 20
    batch: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    layer_decay: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    augment: Augmentation = "flip"
    squash: bool = False
    size: int | None = None
    mixed_precision: Precision = "no"
    patience: int = 0
    search: int = 0
    search_epochs: int = 3
    keep_epoch: Literal["best", "last"] = "best"
    cache: bool = True
    seed: int = 0
    resume: bool = False
    dry_run: bool = False
    workers: int = 0
    tracker: str = "none"
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch", 1),
            ("gradient_accumulation_steps", 1),
            ("patience", 0),
            ("search", 0),
            ("search_epochs", 1),
            ("workers", 0),
        ):
            self._check(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("validation", "test", "warmup", "label_smoothing"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("mixup", "cutmix"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0, or a finite alpha above 0")
        self._check("task_temperature", 0 < self.task_temperature < math.inf, "finite and above 0")
        self._check("ema", 0 <= self.ema < 1, "0, or a decay below 1")
        self._check("layer_decay", 0 < self.layer_decay <= 1, "above 0, at most 1")
        self._check("class_weights", self.class_weights in ("none", "balanced"), "none or balanced")
        self._check("shots", self.shots is None or self.shots >= 1, "at least 1")
        self._check("steps", self.steps is None or self.steps >= 1, "at least 1")
        for name in ("learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            self._check(name, value is None or 0 < value < math.inf, "finite and above 0")
        self._check("keep_epoch", self.keep_epoch in ("best", "last"), "best or last")
        self._check("head", self.head in (None, "fresh", "kept"), "fresh or kept")
        self._check("batch_norm", self.batch_norm in (None, "frozen", "moving"), "frozen or moving")
        self._check("size", self.size is None or self.size >= 8, "at least 8")
        self._check("mixed_precision", self.mixed_precision in AUTOCAST, f"one of {', '.join(AUTOCAST)}")
        self._check("augment", self.augment in ("none", "light", "flip", "strong"), "none, light, flip or strong")
        self._check("templates", all("{}" in t for t in self.templates), "texts with {} in them")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            given = getattr(self, name)
            raise OptionError(f"{name} is {given!r}; expected {expected}.", option=name, given=given, expected=expected)

    def with_defaults(self) -> TransferConfig:
        """The config with a results folder, a new one if none is set."""
        self.check_training_options()
        self.selection()  # rejects two selections
        self.check_multi_label()
        self.check_tasks()
        check_unlabeled(self.unlabeled, self.names())
        if self.lp_ft and self.init_from is not None:
            message = "lp_ft and init_from both initialize the head; leave out one of --lp-ft and --init-from."
            raise OptionError(message, option="init_from", given=str(self.init_from), expected=None)
        dataset = "+".join(self.task_sources()) if self.tasks else Path(self.data).name if self.data else "digits"
        out = self.out or new_folder(Path("runs"), f"{dataset}-{self.method}", self.resume)
        return dataclasses.replace(self, out=out)

    def check_multi_label(self) -> None:
        """Raises the errors of `check_support`, if images may have several labels."""
        if self.multi_label:
            check_support(self.model, self.names(), self.keeps_head(), self.shots)

    def check_tasks(self) -> None:
        """Raises the errors of `check_task_options`, and of `task_sources` for a run with several tasks."""
        classes = [methods.get(name) for name in self.names()]
        class_names = self.keeps_head() or self.model == "bundled_clip" or self.model.startswith("open_clip:")
        others = {"multi_label": self.multi_label, "search": self.search}
        check_task_options(self.tasks, self.more_data, classes, class_names, others)
        self.task_sources()

    def task_sources(self) -> dict[str, str]:
        """Name to data of each task; empty for a run with one data set without `tasks`."""
        return task_sources([self.data or "digits", *self.more_data]) if self.tasks else {}

    def build_methods(self, classes: int = 0, shots: int = 0) -> list[Method]:
        """Configs of the methods, in order.

        Args:
            classes, shots: number of classes, and the most training images of one class: values for method options of these names
                that are not set.
        Raises:
            VeneerError: options for a method that is not trained. UnknownName: no such method.
        """
        names = self.names()
        stray = sorted(set(self.options) - set(names))
        if stray:
            message = f"options for {', '.join(stray)}, but the run trains {', '.join(names)}."
            raise OptionError(message, option="options", given=tuple(stray), expected=tuple(names))
        self.check_method_where(names)
        data = {"classes": classes, "shots": shots, "tasks": tuple(self.task_sources())}
        return [methods.get(name).from_config(self._method_options(name, **data)) for name in names]

    def _method_options(self, name: str, **data: Any) -> dict[str, Any]:
        """A method's options, completed with the properties of the data that it has options for."""
        method, options = methods.get(name), self.options.get(name, {})
        known = {f.name for f in dataclasses.fields(method)}
        if not (method.keeps_head or options.get("head_free")):  # a new head has the classes
            known.discard("classes")
        return {**{k: v for k, v in data.items() if v and k in known}, **options}

    def keeps_head(self) -> bool:
        """True if the model's own head is kept."""
        by_method = [methods.get(name).keeps_head for name in self.names()]
        return self.head == "kept" if self.head else any(by_method)

    def rate(self) -> float:
        """The peak learning rate."""
        default = next((methods.get(name).learning_rate for name in self.names()), 1e-3)
        return default if self.learning_rate is None else self.learning_rate

    def head_rate(self, solved: bool) -> float:
        """The peak learning rate of a new head beside the methods. `solved`: it is initialized with a logistic regression."""
        if self.head_learning_rate is not None:
            return self.head_learning_rate
        return min(self.rate(), SOLVED_HEAD_RATE) if solved else self.rate()

    def names(self) -> list[str]:
        """Names of the methods; empty for `zero_shot`, which trains nothing."""
        return [] if self.method == "zero_shot" else split_methods(self.method)

    def loop(self, per_epoch: int, steps: int) -> TrainConfig:
        """Configuration of the training loop: a checkpoint and a validation pass after every epoch."""
        return loop_config(
            self,
            steps=steps,
            learning_rate=self.rate(),
            warmup=round(self.warmup * steps),
            checkpoint_every=per_epoch,
            preview_every=per_epoch,
        )

    def identity(self) -> dict[str, Any]:
        """Options that a resumed run must share, beyond those of the training loop and the hashes of the images."""
        unused = () if self.tasks else ("tasks", "task_temperature")
        return run_identity(self, (*WITHOUT_EFFECT, *unused, *(() if self.method_where else ("method_where",))))
