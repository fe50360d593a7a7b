"""Order of the training samples, the loss of a step, and evaluation in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from veneer.training.loop.seeds import generator
from veneer.training.objective.forward_passes import ForwardPasses

from ..objectives.objective import Objective
from ..objectives.single_label import SINGLE_LABEL
from ..objectives.single_label import balanced_weights as balanced_weights
from .mixing import Mixing

Batch = tuple[Tensor, Tensor]


class SampleOrder(Protocol):
    """Order of the samples of a run, a pure function of their numbers."""

    def at(self, number: int) -> tuple[int, int]:
        """(epoch, image) of a sample."""


class Order(SampleOrder):
    """Shuffled order of the samples of a run: sample n is image n mod N of epoch n // N, with a new permutation every epoch.

    Args:
        indices: of the training images. `seed`: of the permutations.
    """

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        self.indices, self.seed = tuple(indices), seed
        self._orders: dict[int, list[int]] = {}

    def at(self, number: int) -> tuple[int, int]:
        """(epoch, image) of a sample."""
        epoch, position = divmod(number, len(self.indices))
        if epoch not in self._orders:
            permutation = torch.randperm(len(self.indices), generator=generator(self.seed, "order", epoch)).tolist()
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: permutation}
        return epoch, self.indices[self._orders[epoch][position]]


class ClassifyingLoss:
    """Loss of a step's images: `Objective.loss`, by default the cross-entropy.

    Args:
        logits: computes logits from inputs (B, …): the model from images, or its head from features.
        inputs: `inputs([(epoch, index), …])` returns inputs and labels.
        order: of the samples. `samples`: samples per step, over all processes.
        prefetch: called with the samples of this step and the next, or None.
        smoothing: label smoothing.
        device: of the model.
        class_weights: (classes,), or None.
        mixing: mixup and CutMix, or None.
        objective: computes the loss of logits and targets.
        passes: runs the forward passes that the methods ask for.
        unlabeled: returns the unlabeled images of rows of a step in one of several views, or None.
        generations: returns images and labels of rows of a step, or None for those of `inputs`; None without generations.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        inputs: Callable[[Sequence[tuple[int, int]]], Batch],
        order: SampleOrder,
        samples: int,
        prefetch: Callable[[Sequence[tuple[int, int]]], None] | None = None,
        smoothing: float = 0.0,
        device: torch.device | str = "cpu",
        class_weights: Tensor | None = None,
        mixing: Mixing | None = None,
        objective: Objective = SINGLE_LABEL,
        passes: ForwardPasses | None = None,
        unlabeled: Callable[[int, list[int], int, int], Tensor] | None = None,
        generations: Callable[[int, Sequence[int], int], Batch | None] | None = None,
    ) -> None:
        self.unlabeled, self.generations = unlabeled, generations
        self.objective, self.passes = objective, passes or ForwardPasses()
        self.class_weights = None if class_weights is None else class_weights.to(device)
        self.mixing = mixing if mixing is not None and mixing.enabled else None
        self.logits, self.inputs, self.samples = logits, inputs, samples
        self.order: SampleOrder = order
        self.prefetch, self.smoothing, self.device = prefetch, smoothing, device

    def __call__(self, step: int, rows: list[int]) -> Tensor:
        loss = self._without_labels(step, rows)
        return self._with_labels(step, rows) if loss is None else loss

    def _without_labels(self, step: int, rows: list[int]) -> Tensor | None:
        """The loss of a step without labels, or None if the methods ask for a labeled step."""
        if self.unlabeled is None:
            return None
        load, images = self.unlabeled, dict[int, Tensor]()

        def compute(view: int) -> Tensor:
            if view not in images:
                images[view] = load(step, rows, self.samples, view).to(self.device)
            return self.logits(images[view]).float()

        return self.passes.without_labels(step, compute)

    def _with_labels(self, step: int, rows: list[int]) -> Tensor:
        needed = rows if self.mixing is None else [*dict.fromkeys([*rows, *(self.mixing.partner(r, self.samples) for r in rows)])]
        inputs, labels = self._read(step, needed)
        inputs, labels = inputs.to(self.device), labels.to(self.device)
        if self.mixing is not None:
            return self._mixed(self.mixing, step, rows, needed, inputs, labels)
        return self._forward(step, inputs, lambda logits: self._loss(logits, labels))

    def _read(self, step: int, rows: Sequence[int]) -> Batch:
        """Inputs and labels of rows of a step."""
        batch = None if self.generations is None else self.generations(step, rows, self.samples)
        if batch is not None:
            return batch
        samples, following = ([self.order.at(n * self.samples + row) for row in rows] for n in (step, step + 1))
        if self.prefetch is not None:
            self.prefetch([*samples, *following])
        return self.inputs(samples)

    def _mixed(self, mixing: Mixing, step: int, rows: list[int], needed: list[int], inputs: Tensor, labels: Tensor) -> Tensor:
        """λ L(f(x), y) + (1 − λ) L(f(x), y') of images that are mixed with their partners."""
        places = [needed.index(row) for row in rows]
        partners = [needed.index(mixing.partner(row, self.samples)) for row in rows]
        images, weights = mixing(inputs[places], inputs[partners], step, rows)

        def loss(logits: Tensor) -> Tensor:
            return self._loss(logits, labels[places], weights) + self._loss(logits, labels[partners], 1 - weights)

        return self._forward(step, images, loss)

    def _forward(self, step: int, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of the logits, with the mean consistency loss of the images if a method has one."""
        logits, extra = self.passes(step, lambda: self.logits(inputs).float(), self.objective.divergence, loss)
        return _with_mean(loss(logits), extra)

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.objective.loss(logits, labels, self.smoothing, self.class_weights, weights)


def _with_mean(loss: Tensor, extra: Tensor | None) -> Tensor:
    return loss if extra is None else loss + extra.mean()


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """Logits and labels of all batches, on the CPU. The model runs in evaluation mode; its modes are restored.

    Args:
        model: the classifier, or its head. `batches`: images (or features) and labels. `dtype`: of autocast, or None.
    """
    modes = {m: m.training for m in model.modules()}
    logits: list[Tensor] = []
    truth: list[Tensor] = []
    try:
        model.eval()
        for inputs, labels in batches:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits.append(model(inputs.to(device)).float().cpu())
            truth.append(labels)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(logits), torch.cat(truth)
