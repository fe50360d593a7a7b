"""Training of a classifier: the picture loss in the shared loop, with the epoch chosen on validation pictures only."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from veneer.injection import Attachment, VeneerError, attach
from veneer.injection.attachment.model_state import statistics
from veneer.injection.seams.call_seam import Seam
from veneer.training import param_groups
from veneer.training.loop.checkpoints import Checkpoints
from veneer.training.loop.optimizer_step import AUTOCAST
from veneer.training.loop.optimizers import Group
from veneer.training.loop.seeds import mix
from veneer.training.loop.trainer import Trainer, TrainResult
from veneer.training.report.progress import Progress, peak_memory

from ..config import TransferConfig
from ..data.run_data import Data, Views
from ..models.cached_features import Features, reads_features_only
from ..models.classifier import Classifier
from ..models.linear_probe_init import Head, put_first_head, takes_first_head
from ..report.metrics import Figures, figures_of
from .batches import Batch, ClassifyingLoss, Order, logits_of
from .epoch_selection import Epoch, Selection


def attach_methods(classifier: Classifier, config: TransferConfig, data: Data) -> list[Attachment]:
    """Attach the methods, seeded; and a `linear_probe` beside them, where nobody else holds a fresh head."""
    attached: list[Attachment] = []
    labels = Counter(data.source.examples[i].label for i in data.splits.train)
    for method in config.built(len(data.classes), max(labels.values())):
        torch.manual_seed(mix(config.seed, "adapters", method.name))
        attached.append(attach(classifier.model, method, where=config.where))
    if classifier.fresh and not any(_holds_head(a) for a in attached):
        attached.append(attach(classifier.model, "linear_probe"))
    return attached


def _holds_head(attachment: Attachment) -> bool:
    return any(adapter.replaces and site.role == "head" for site, adapter in attachment.parts.values())


@contextlib.contextmanager
def switched_off(attached: Iterable[Attachment]) -> Iterator[None]:
    """A context with nothing attached acting."""
    with contextlib.ExitStack() as stack:
        for attachment in attached:
            stack.enter_context(attachment.enabled(False))
        yield


@dataclass(frozen=True)
class Taught:
    """How a run ended.

    Args:
        result: of the loop. `epochs`: figures of each. `best`: the epoch whose weights are in place; None for a run that was
            stopped: then those of the best so far are, or those of the last step where no epoch has ended.
        validation: figures of the validation pictures at `best`.
        cached: True if the backbone ran once for each picture.
        trainable: numbers that were trained.
    """

    result: TrainResult
    epochs: tuple[Epoch, ...]
    best: Epoch | None
    validation: Figures | None
    cached: bool
    trainable: int


class Teacher:
    """A classifier with adapters on it, and the pictures that it learns from.

    Args:
        classifier, attached: as from `open_classifier` and `attach_methods`.
        views: of the run's pictures. `config`: the options.
        folder: for checkpoints and records. `identity`: what a resumed run must share.
        features: of the same model and views, from another run; used where the backbone need not run again.
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
        features: Features | None = None,
    ) -> None:
        self.classifier, self.attached, self.views, self.config, self.folder = classifier, attached, views, config, folder
        self.accelerator = accelerator
        self.dtype = AUTOCAST[config.mixed_precision]
        classifier.model.to(accelerator.device)
        self.model: Any = classifier.model
        cached = config.cache and reads_features_only(classifier, attached)
        self._seen = features or Features(classifier, views, config.batch, self.dtype)
        self.features = self._seen if cached else None
        self.per_epoch = max(1, len(views.data.splits.train) // (config.batch * config.accumulation))
        self.steps = config.steps or config.epochs * self.per_epoch
        self.named = param_groups.named_state(attached)
        if self._moving:
            self.named |= {f"statistics/{name}": buffer for name, buffer in statistics(self.model.named_modules())}
        self.selection = Selection(self.named, folder, config.patience)
        self.trainable = sum(p.numel() for a in attached for p in a.parameters())
        self.identity, self.on_step = identity or {}, on_step

    def teach(self) -> Taught:
        """Prepare, train, and put the best epoch's weights in place.

        Raises:
            Diverged, CheckpointError: as the loop does.
        """
        self._refuse_several()
        self._see()
        self._modes()
        self._prepare(0)
        result = self._fit() if self.trainable else TrainResult(0, [], 0.0, peak_memory(self.accelerator.device), False)
        best = None
        if self.accelerator.is_main_process and (not result.stopped or self.selection.exhausted):
            if not self.selection.epochs:
                self._look(0, [])
            best = self.selection.best
        if self.accelerator.is_main_process and self.selection.epochs:
            self.selection.restore()
        validation = self.figures("validation") if best else None
        return Taught(result, tuple(self.selection.epochs), best, validation, self.features is not None, self.trainable)

    def _see(self) -> None:
        """Run the backbone once, where its features are all that is needed, or tell the head where to start."""
        if self.features is not None:
            self.features.see()
        if self.starts_head and not (self.config.resume and Checkpoints(self.folder, {}).steps()):
            put_first_head(self.solved_head(), self.attached, self._seen.path)

    def solved_head(self) -> Head:
        """Weight and bias of the logistic regression on the features of the frozen model."""
        with switched_off(self.attached):
            return self._seen.first_head(len(self.views.data.classes))

    def frozen(self, split: str) -> Batch:
        """Features of the frozen model and labels of a split."""
        with switched_off(self.attached):
            self._seen.see((split,))
        return self._seen([(0, index) for index in getattr(self.views.data.splits, split)])

    @property
    def starts_head(self) -> bool:
        """True if a fresh head starts where a probe of the frozen features ends."""
        wanted = self.config.lp_ft and self.classifier.fresh and self.classifier.weights != "random"
        return (
            wanted and self.classifier.features is not None and takes_first_head(self._seen.head, self.attached, self._seen.path)
        )

    def loss(self) -> ClassifyingLoss:
        """The loss of the training pictures, or of their features."""
        cached = self.features
        return ClassifyingLoss(
            self.model if cached is None else cached.head,
            self.views.train if cached is None else cached,
            Order(self.views.data.splits.train, self.config.seed),
            self.config.batch * self.config.accumulation,
            self.views.train.expect if cached is None else None,
            self.config.label_smoothing,
            self.accelerator.device,
        )

    def _fit(self) -> TrainResult:
        loop, loss = self.config.loop(self.per_epoch, self.steps), self.loss()

        def look(step: int) -> None:
            self._look(step, trainer.losses[-self.per_epoch :])
            if self.selection.exhausted:
                trainer.stop()

        trainer = Trainer(
            loop,
            self._groups(),
            param_groups.with_penalties(loss, self.attached),
            self.named,
            self.folder,
            identity=self.identity,
            accelerator=self.accelerator,
            after_step=param_groups.after_step(self.attached),
            on_step=self.on_step,
            on_preview=look,
        )
        steps = trainer.checkpoints.steps() if trainer.checkpoints else []
        if self.config.resume and steps:
            self.selection.resume(steps[-1])
        result = trainer.fit(self.config.resume)
        if not result.stopped and self.steps % self.per_epoch and self.accelerator.is_main_process:
            self._look(self.steps, trainer.losses[-(self.steps % self.per_epoch) :])
        return result

    def figures(self, split: str) -> Figures:
        """Figures of a split with the weights as they are."""
        return figures_of(*self.answers(split))

    def answers(self, split: str) -> Batch:
        """Logits and labels of a split."""
        device = self.accelerator.device
        if self.features is not None:
            return logits_of(self.features.head, self.features.batches(split, 256), device, self.dtype)
        return logits_of(self.model, self.views.batches(split, self.config.batch), device, self.dtype)

    @property
    def _moving(self) -> bool:
        """True if norms take their statistics from the batches: of random weights there are none worth keeping."""
        return self.config.batch_norm == "moving" or (self.config.batch_norm is None and self.classifier.weights == "random")

    def _modes(self) -> None:
        """The base in `eval`, so that it neither drops features nor moves its statistics; the adapters in training mode."""
        self.model.train(self._moving)
        for module in self.model.modules():
            if isinstance(module, Seam):
                module.train()

    def _refuse_several(self) -> None:
        """Methods that see the data first do so in one process."""
        wanting = [a.method.name for a in self.attached if a.method.prepares]
        if wanting and self.accelerator.num_processes > 1:
            message = f"{', '.join(wanting)}: sees the data before it is trained, in one process. Start one only."
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
        """The training pictures as they are looked at, or several times as they are trained on."""
        indices, size = self.views.data.splits.train, self.config.batch
        if count == 1:
            return self.views.batches("train", size)
        return chain.from_iterable(self.views.train.batches(indices, size, epoch) for epoch in range(count))

    def _on_device(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        device = self.accelerator.device
        return ((inputs.to(device), labels.to(device)) for inputs, labels in batches)

    def _groups(self) -> list[Group]:
        """The first method and a head beside it at the run's rate, other methods as much faster or slower as they usually are."""
        found: list[Group] = []
        for attachment in self.attached:
            named = attachment.method.name in self.config.names()
            share = attachment.method.learning_rate / self.attached[0].method.learning_rate if named else 1.0
            for number, group in enumerate(attachment.groups()):
                scale = group.get("lr_scale", 1.0) * share
                if group["params"]:
                    found.append({"params": group["params"], "lr_scale": scale, "name": f"{attachment.name}.{number}"})
        return found

    def _look(self, step: int, losses: Sequence[float]) -> None:
        """After an epoch: how well the validation pictures are answered."""
        figures = self.figures("validation")
        mean = sum(losses) / len(losses) if losses else math.nan
        number = math.ceil(step / self.per_epoch)
        self.selection.add(Epoch(number, step, mean, figures.loss, figures.accuracy))
        if number:
            self._prepare(number)
