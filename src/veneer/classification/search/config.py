"""Configuration of `veneer search`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.base_models.devices import Precision
from veneer.injection.errors import OptionError
from veneer.training.loop.optimizer_options import OptimizerOptions
from veneer.training.report.run_folder import new_folder

from ..config import TransferConfig
from ..data.transforms import Augmentation
from .evolution import Evolution

METHODS = {"s4": "adaptformer, prefix_tuning(hidden=0), bitfit, lora"}
"""Default methods of a space, if they are not those of the other spaces."""
OF_TRIALS = ("space", "methods", "sizes", "groups", "trial_epochs", "supernet_epochs")
"""Options of the search on which the metrics of a trial depend."""
NOT_OF_TRIALS = ("data", "model", "weights", "out", "resume", "dry_run", "workers", "tracker", "epochs", "method", "options")
"""Options of the training on which they do not depend, or whose content is compared."""


@dataclass(frozen=True)
class SearchConfig(OptimizerOptions):
    """Configuration of `veneer search` and its defaults.

    Args:
        budget_parameters: largest number of trainable parameters of a sub-network, without the head; required. `veneer transfer
            --dry-run` prints the number of a method.
        data: image folder (`CLASS/IMAGE`, or `train/CLASS/IMAGE` and so on), a CSV of path, label and optionally split, a
            dataset of Hugging Face (folder or hub name) with such files, or `digits` of scikit-learn (default: digits).
        model: a timm name or folder, `hf:` and a folder or hub name of a vision model of transformers, or `bundled` (the image
            encoder of the bundled CLIP).
        weights: a .safetensors file for the model, or `none` for random weights (default: the published weights).
        methods: methods to combine, not joined by `+`, with options in parentheses, in quotes: `'lora, adaptformer(scale=0.5),
            vpt(tokens=4)'`; a size in parentheses is fixed (default: `lora, adaptformer, vpt`, with the space s4 `adaptformer,
            prefix_tuning(hidden=0), bitfit, lora`).
        space: `noah`: each method in the first blocks up to a depth, trials evaluated with the shared weights of one trained
            supernet; `blocks`: any methods in any blocks, each trial trained alone; `s4`: groups of blocks in the form of a
            spindle (2, 4, 4 and 2 of 12), the same number of parameters in every block, one or more methods in each group, each
            trial trained alone.
        sizes: sizes to choose from, in ascending order: the rank of lora, the bottleneck of adaptformer, the tokens of vpt and so
            on; s4 takes the largest within the budget instead.
        groups: number of groups of consecutive blocks; the blocks of a group have the same methods and sizes (default: one group
            for each block, with s4 4).
        trials: sub-networks to evaluate on the validation split.
        population: sub-networks of a generation: the first generation is random, later ones are half mutations and half
            crossovers of the best.
        parents: number of the best trials so far from which mutations and crossovers are made.
        mutation: probability that a mutation samples a size again, or with s4 changes a method of a group, 0 to 1.
        supernet_epochs: passes over the training images to train the supernet (noah).
        trial_epochs: passes over the training images to train one trial (blocks, s4).
        baselines: also train each method alone, with one size in all blocks, the largest within the budget.
        shots: training images per class (default: all).
        validation: share of the images for the validation split, by which trials are compared, 0 to 1; not used if the data has
            one.
        test: share of the images for the test split, on which the chosen sub-network and the baselines are evaluated at the end,
            0 to 1; not used if the data has one.
        split_seed: seed of the validation and test splits.
        epochs: passes over the training images in the final training runs, of the chosen sub-network and of each baseline.
        batch: images per optimizer step.
        learning_rate: peak learning rate of the first of the methods, and of the head, in all training runs (default: the
            method's). Other methods keep their ratio to it; the search does not tune it.
        schedule: learning-rate schedule: `constant`, `cosine`, `cosine_with_restarts`, `linear`, `polynomial` or `rex`.
        warmup: share of the steps with linear warmup before the schedule, 0 to 1.
        weight_decay: decoupled weight decay of all trained parameters.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        augment: `none`, `light` (random crop), `flip` (also horizontal flips, except of `digits`) or `strong` (also RandAugment
            and random erasing).
        squash: resize to a square that ignores the aspect ratio, without a crop, as VTAB does.
        size: side of the images in pixels (default: the model's).
        mixed_precision: autocast of the forward pass to this dtype; `no` disables it.
        seed: seed of all random numbers.
        resume: continue the search in `out`; finished trials are not repeated.
        workers: threads that read images; 0 uses one per core.
        out: run folder, for all results (default: a new one under `runs`).
    """

    budget_parameters: int
    data: str | None = None
    model: str = "bundled"
    weights: str | None = None
    methods: str | None = None
    space: Literal["noah", "blocks", "s4"] = "noah"
    sizes: tuple[int, ...] = (1, 5, 10)
    groups: int | None = None
    trials: int = 64
    population: int = 16
    parents: int = 4
    mutation: float = 0.2
    supernet_epochs: int = 20
    trial_epochs: int = 3
    baselines: bool = True
    shots: int | None = None
    validation: float = 0.1
    test: float = 0.15
    split_seed: int = 0
    epochs: int = 20
    batch: int = 32
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    augment: Augmentation = "flip"
    squash: bool = False
    size: int | None = None
    mixed_precision: Precision = "no"
    seed: int = 0
    resume: bool = False
    workers: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("budget_parameters", "trials", "parents", "supernet_epochs", "trial_epochs"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("groups", self.groups is None or self.groups >= 1, "at least 1")
        self._check("population", self.population >= 2, "at least 2")
        self._check("mutation", 0 <= self.mutation <= 1, "0 to 1")
        self._check("space", self.space in ("noah", "blocks", "s4"), "noah, blocks or s4")
        ascending = tuple(sorted(set(self.sizes)))
        self._check("sizes", bool(ascending) and self.sizes == ascending and ascending[0] >= 1, "ascending numbers from 1")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            value = getattr(self, name)
            message = f"{name} is {value!r}; expected {expected}."
            raise OptionError(message, option=name, given=value, expected=expected)

    def with_defaults(self) -> SearchConfig:
        """The config with the defaults of its space, and with a results folder, a new one if none is set."""
        name = f"search-{Path(self.data).name if self.data else 'digits'}-{self.space}"
        return dataclasses.replace(
            self,
            methods=self.methods or METHODS.get(self.space, "lora, adaptformer, vpt"),
            out=self.out or new_folder(Path("runs"), name, self.resume),
        )

    def shared(self) -> TransferConfig:
        """The options of `veneer transfer` that all trials share."""
        names = {f.name for f in dataclasses.fields(TransferConfig)} & {f.name for f in dataclasses.fields(self)}
        shared: dict[str, Any] = {name: getattr(self, name) for name in names - {"out"}}
        return TransferConfig(method="linear_probe", **shared)

    def evolution(self) -> Evolution:
        """Options of the evolutionary search."""
        return Evolution(self.trials, self.population, self.parents, self.mutation, self.seed)

    def settings(self, splits: str, base: Mapping[str, str]) -> str:
        """Hash of everything that the metrics of a trial depend on.

        Args:
            splits: digest of the data. `base`: `Classifier.identity`.
        """
        shared = self.shared()
        options = {f.name: getattr(shared, f.name) for f in dataclasses.fields(shared) if f.name not in NOT_OF_TRIALS}
        content = {**options, **{name: getattr(self, name) for name in OF_TRIALS}, "splits": splits, "base": {**base}}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
