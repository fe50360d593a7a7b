"""Training of a classifier in the shared loop, with the epoch selected on the validation split only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from veneer.injection import Attachment, VeneerError
from veneer.injection.attachment.model_state import statistics
from veneer.injection.errors import OptionError
from veneer.injection.seams.seam import Seam
from veneer.training import param_groups
from veneer.training.adapter_trainer import adapter_trainer
from veneer.training.block_learning_rates import with_block_rates
from veneer.training.loop.checkpoints import Checkpoints
from veneer.training.loop.optimizer_step import AUTOCAST
from veneer.training.loop.optimizers import ParameterGroup, end_training
from veneer.training.loop.trainer import TrainResult
from veneer.training.objective.forward_passes import ForwardPasses
from veneer.training.report.progress import Progress, peak_memory

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.cached_features import CachedFeatures, reads_features_only
from ..models.classifier import Classifier
from ..models.linear_probe_init import Head, accepts_probe_init, init_head
from ..objectives.objective import Metrics
from .attach_methods import adapters_disabled
from .batches import Batch, ClassifyingLoss, Order, logits_of
from .epoch_selection import Epoch, EpochSelection
from .layer_decay import layer_factors, with_layer_decay
from .mixing import Mixing
from .pseudo_labels import pseudo_labels


@dataclass(frozen=True)
class TransferResult:
    """Result of a training run.

    Args:
        loop: result of the training loop. `epochs`: metrics of each.
        best: the epoch whose weights the model has. None after a stop: the model then has the weights of the best epoch so far,
            or of the last step if no epoch was completed.
        validation: metrics of the validation split at `best`.
        cached: True if the features were computed once per image.
        trainable: number of trainable parameters.
    """

    loop: TrainResult
    epochs: tuple[Epoch, ...]
    best: Epoch | None
    validation: Metrics | None
    cached: bool
    trainable: int


class ClassifierTrainer:
    """Trains the adapters of a classifier, and evaluates it.

    Args:
        classifier, attached: from `open_classifier` and `attach_methods`.
        views: of the run's images. `config`: the options.
        folder: for checkpoints and records. `identity`: values that a resumed run must share.
        features: feature cache of the same model and views from another run, to reuse.
    """

    def __init__(
        self,
        classifier: Classifier,
        attached: Sequence[Attachment],
        views: Views,
        config: TransferConfig,
        folder: Path,
        accelerator: Accelerator,
        identity: dict[str, Any] | None = None,
        on_step: Callable[[Progress], None] | None = None,
        features: CachedFeatures | None = None,
    ) -> None:
        self.classifier, self.attached, self.views, self.config, self.folder = classifier, attached, views, config, folder
        self.accelerator = accelerator
        self.dtype = AUTOCAST[config.mixed_precision]
        classifier.model.to(accelerator.device)
        self.model: Any = classifier.model
        if config.layer_decay != 1:
            layer_factors(attached, config.layer_decay)  # raises before any feature is computed
        self._check_head_rate()
        self.mixing = Mixing(config.mixup, config.cutmix, config.seed)
        plain = config.cache and not self.mixing.enabled and views.unlabeled is None
        cached = plain and reads_features_only(classifier, attached)
        self._frozen = features or CachedFeatures(classifier, views, config.batch, self.dtype)
        self.features = self._frozen if cached else None
        self.per_epoch = max(1, len(views.data.splits.train) // (config.batch * config.gradient_accumulation_steps))
        self.steps = config.steps or config.epochs * self.per_epoch
        self.named = param_groups.named_state(attached)
        if self._updates_statistics:
            self.named |= {f"statistics/{name}": buffer for name, buffer in statistics(self.model.named_modules())}
        first = max((a.method.schedule_end(self.steps) for a in attached), default=0)
        self.selection = EpochSelection(self.named, folder, config.patience, last=config.keep_epoch == "last", first=first)
        self.trainable = sum(p.numel() for a in attached for p in a.parameters())
        self.identity, self.on_step = identity or {}, on_step

    def train(self) -> TransferResult:
        """Prepares the methods, trains, restores the best epoch's weights, and finalizes the methods unless the run was stopped.

        Raises:
            Diverged, CheckpointError: as the loop does.
        """
        self._check_processes()
        self._init_inputs()
        self._set_modes()
        self._prepare(0)
        result = self._fit() if self.trainable else TrainResult(0, [], 0.0, peak_memory(self.accelerator.device), False)
        best = None
        if self.accelerator.is_main_process and (not result.stopped or self.selection.exhausted):
            if not self.selection.epochs:
                self._evaluate(0, [])
            best = self.selection.best
        if self.accelerator.is_main_process and self.selection.epochs:
            self.selection.restore()
        if best is not None:
            param_groups.finalize(self.attached)
        validation = self.metrics("validation") if best else None
        return TransferResult(result, tuple(self.selection.epochs), best, validation, self.features is not None, self.trainable)

    def _init_inputs(self) -> None:
        """Computes the cached features, if the run uses them, and initializes the head, if it starts at the linear probe."""
        if self.features is not None:
            self.features.compute()
        if self.uses_probe_init and not (self.config.resume and Checkpoints(self.folder, {}).steps()):
            init_head(self.probe_head(), self.attached, self._frozen.path)

    def probe_head(self) -> Head:
        """Weight and bias of the logistic regression on the frozen model's features."""
        with adapters_disabled(self.attached):
            return self._frozen.linear_probe(len(self.views.data.classes))

    def frozen_features(self, split: str) -> Batch:
        """The frozen model's features, and the labels, of a split."""
        with adapters_disabled(self.attached):
            self._frozen.compute((split,))
        return self._frozen([(0, index) for index in getattr(self.views.data.splits, split)])

    @property
    def uses_probe_init(self) -> bool:
        """True if the fresh head is initialized with the linear probe of the frozen features."""
        enabled = self.config.lp_ft and self.classifier.fresh and self.classifier.weights != "random"
        return (
            enabled
            and self.classifier.features is not None
            and accepts_probe_init(self._frozen.head, self.attached, self._frozen.path)
        )

    def loss(self) -> ClassifyingLoss:
        """Training loss, on images or on cached features."""
        cached = self.features
        return ClassifyingLoss(
            self.model if cached is None else cached.head,
            self.views.train if cached is None else cached,
            Order(self.views.data.splits.train, self.config.seed),
            self.config.batch * self.config.gradient_accumulation_steps,
            self.views.train.prefetch if cached is None else None,
            self.config.label_smoothing,
            self.accelerator.device,
            self._class_weights(),
            self.mixing,
            self.views.data.objective,
            ForwardPasses(self.attached, self.config.seed),
            self.views.unlabeled,
            pseudo_labels(self.attached, self.views, self.steps, self.config, self.model, self.accelerator.device, self.folder),
        )

    def _class_weights(self) -> Tensor | None:
        """Weights of the classes in the loss, by their training images."""
        if self.config.class_weights == "none":
            return None
        data = self.views.data
        return data.objective.class_weights(data.targets("train"), len(data.classes))

    def _fit(self) -> TrainResult:
        loop, loss = self.config.loop(self.per_epoch, self.steps), self.loss()

        def evaluate(step: int) -> None:
            with trainer.averaged():
                self._evaluate(step, trainer.losses[-self.per_epoch :])
            self._prepare(math.ceil(step / self.per_epoch))
            if self.selection.exhausted:
                trainer.stop()

        trainer = adapter_trainer(
            self.attached,
            loss,
            loop,
            self._groups(),
            self.folder,
            identity=self.identity,
            accelerator=self.accelerator,
            on_step=self.on_step,
            on_preview=evaluate,
            named=self.named,
            different=len(self.views.data.splits.train),
        )
        steps = trainer.checkpoints.steps() if trainer.checkpoints else []
        if self.config.resume and steps:
            self.selection.resume(steps[-1])
        result = trainer.fit(self.config.resume)
        end_training(trainer.optimizer)
        if not result.stopped and self.steps % self.per_epoch and self.accelerator.is_main_process:
            with trainer.averaged():
                self._evaluate(self.steps, trainer.losses[-(self.steps % self.per_epoch) :])
        return result

    def metrics(self, split: str) -> Metrics:
        """Metrics of a split with the current weights."""
        return self.views.data.objective.metrics(*self.predict(split))

    def predict(self, split: str) -> Batch:
        """Logits and labels of a split."""
        device = self.accelerator.device
        if self.features is not None:
            return logits_of(self.features.head, self.features.batches(split, 256), device, self.dtype)
        return logits_of(self.model, self.views.batches(split, self.config.batch), device, self.dtype)

    @property
    def _updates_statistics(self) -> bool:
        """True if BatchNorm statistics are updated: by default only those of random weights."""
        return self.config.batch_norm == "moving" or (self.config.batch_norm is None and self.classifier.weights == "random")

    def _set_modes(self) -> None:
        """Sets adapters to training mode, and the base model to `eval` unless its statistics are updated."""
        self.model.train(self._updates_statistics)
        for module in self.model.modules():
            if isinstance(module, Seam):
                module.train()

    def _check_processes(self) -> None:
        """Raises an error if a method with a pass over the data, before or between steps, would run in several processes."""
        preparing = [a.method.name for a in self.attached if a.method.prepares or a.method.generation_starts(self.steps)]
        if preparing and self.accelerator.num_processes > 1:
            message = f"{', '.join(preparing)}: its pass over the data needs a single process; start only one."
            raise VeneerError(message, where="processes", given=self.accelerator.num_processes, expected=1)

    def _prepare(self, epoch: int) -> None:
        for attachment in self.attached:
            when = attachment.method.prepares
            if when == "epoch" or (when == "once" and epoch == 0):
                passes = getattr(attachment.method, "views", 1)
                if self.features is not None and passes == 1:
                    attachment.prepare(self._on_device(self.features.batches("train", 256)), self.features.head)
                else:
                    attachment.prepare(self._on_device(self._passes(passes)))

    def _passes(self, count: int) -> Iterator[Batch]:
        """Batches of the training images: one pass without augmentation, or `count` augmented passes in sequence."""
        indices, size = self.views.data.splits.train, self.config.batch
        if count == 1:
            return self.views.batches("train", size)
        return chain.from_iterable(self.views.train.batches(indices, size, epoch) for epoch in range(count))

    def _on_device(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        device = self.accelerator.device
        return ((inputs.to(device), labels.to(device)) for inputs, labels in batches)

    def _check_head_rate(self) -> None:
        """Raises an error for a learning rate of the head, if no head is trained beside the methods."""
        names, rate = self.config.names(), self.config.head_learning_rate
        if rate is not None and all(a.method.name in names for a in self.attached):
            remedy = "use its option head_rate" if "full" in names else "leave the option out"
            message = f"head_learning_rate: {self.config.method} has no new head beside it; {remedy}."
            raise OptionError(message, option="head_learning_rate", given=rate, expected=None)

    def _groups(self) -> list[ParameterGroup]:
        """Parameter groups. The first method gets the run's learning rate, each other method this rate times the ratio of its
        default to that of the first, and a new head beside them its own."""
        names, groups = self.config.names(), list[ParameterGroup]()
        of_head = self.config.head_rate(self.uses_probe_init) / self.config.rate()
        for attachment in self.attached:
            in_config = attachment.method.name in names
            ratio = attachment.method.learning_rate / self.attached[0].method.learning_rate if in_config else of_head
            for number, group in enumerate(attachment.groups()):
                if group["params"]:
                    name = f"{attachment.name}.{number}"
                    groups.append(param_groups.scaled_group(group, group["params"], ratio, name))
        groups = with_layer_decay(groups, self.attached, self.config.layer_decay)
        return with_block_rates(groups, self.attached, self.config.block_lr)

    def _evaluate(self, step: int, losses: Sequence[float]) -> None:
        """Evaluates the validation split after an epoch."""
        metrics = self.metrics("validation")
        mean = sum(losses) / len(losses) if losses else math.nan
        number = math.ceil(step / self.per_epoch)
        self.selection.add(Epoch(number, step, mean, metrics.loss, metrics.score))
