"""The part of `Attachment` that training calls: passes over the data, forward passes, penalties, and what follows a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ..errors import NotSelected, OptionError, StateError
from ..method import Adapter, Method
from ..sites import Site
from ..training_protocol import Distance
from .probe import eval_mode

_ALLOWED: ContextVar[bool] = ContextVar("unselected_allowed", default=False)


@contextlib.contextmanager
def allow_unselected() -> Iterator[None]:
    """Inside it, entries that are not selected yet may run with gradients: to select them, or to measure a step."""
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


class TrainingHooks:
    """Base class of `Attachment`: what a training loop calls, besides the forward pass."""

    name: str
    method: Method
    parts: dict[str, tuple[Site, Adapter]]
    towers: Mapping[str, nn.Module]
    merged: bool
    _selected: bool = False

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]], run: nn.Module | None = None) -> None:
        """Runs the method's pass over the training data, if it has one (`method.prepares`). For models with a single image input.

        `veneer transfer` calls it. A custom training loop calls it before the first step, or before every epoch.

        Args:
            batches: preprocessed images (B, C, H, W) and labels (B,).
            run: called instead of the model: its head, if the batches are features.
        """
        (tower,) = self.towers.values()
        with eval_mode(tower), torch.no_grad():
            self.method.prepare(list(self.parts.values()), run or tower, batches)

    @property
    def is_selected(self) -> bool:
        """False while the method's entries to train are not selected; True for methods without a selection."""
        if not self._selected:
            adapters = [adapter for _, adapter in self.parts.values()]
            self._selected = not self.method.selects or all(getattr(adapter, "is_selected", True) for adapter in adapters)
        return self._selected

    def select(self, losses: Iterable[Tensor]) -> None:
        """Selects the entries that the method trains, by gradients of the training loss (`method.selects`).

        `veneer.training` calls it before the first step of a run. A custom training loop calls it once; saved files and
        checkpoints have the selection. Gradients of parameters are not changed.

        Args:
            losses: scalar losses with a graph, of one training sample each. They are read one by one, as many as the method
                needs: a generator computes each when it is needed, and its graph is freed before the next.
        Raises:
            EmptySelection: there is no sample, or the gradients are all zero or not finite.
        """
        with allow_unselected(), torch.enable_grad():
            self.method.select(list(self.parts.values()), losses)

    def begin_pass(self, seed: int, step: int, number: int = 0) -> None:
        """Samples what the method uses in the next training forward pass, such as the expert of each site.

        `veneer.training` calls it. A custom training loop calls it before each forward pass if the method's documentation says
        so. With gradient checkpointing, call it again with the same arguments before a pass is recomputed.

        Args:
            seed: of the run. `step`: of the run, from 0. `number`: of the pass in its step, from 0 to `method.passes` − 1.
        """
        self.method.begin_pass(list(self.parts.values()), seed, step, number)

    def consistency_loss(self, outputs: Sequence[Tensor], distance: Distance) -> Tensor:
        """Loss of each batch row, (batch,), to be added to the loss of the first of `method.passes` forward passes.

        Args:
            outputs: logits or predictions of the passes. `distance`: of two outputs for each batch row.
        """
        return self.method.consistency_loss(outputs[: self.method.passes], distance)

    def unlabeled_passes(self) -> int:
        """Forward passes of the next step if it has images without labels instead of a labeled batch, else 0.

        With n passes, run them without gradients from number n − 1 down to 1, then number 0 with gradients, `begin_pass` before
        each, and minimize the mean of `method.unlabeled_loss` of their logits, in order of the numbers.
        """
        return self.method.unlabeled_passes(list(self.parts.values()))

    def begin_generation(self) -> None:
        """Initializes the models of a method's generation again; see `TrainingProtocol.generation_starts`."""
        self.method.begin_generation(list(self.parts.values()))

    def compare_passes(self, losses: Tensor) -> None:
        """Gives the method the losses (passes,) of the forward passes of a micro-batch; most methods do not read them."""
        self.method.compare_passes(list(self.parts.values()), losses[: self.method.passes])

    def penalty(self) -> Tensor | None:
        """Regularization term of the method, to be added to the loss before `backward()`; None for most methods."""
        return self.method.penalty(list(self.parts.values()))

    def after_step(self, step: int, steps: int) -> None:
        """Runs the method's update after an optimizer step. Must be called before the gradients are cleared.

        `veneer.training` calls this and `penalty`. A custom training loop calls them if the method's documentation says so.

        Args:
            step: number of this step, from 1. `steps`: of the whole run.
        Raises:
            ValueError: `step` is not in 1 … `steps`.
        """
        if not 1 <= step <= steps:
            message = f"'{self.name}': after_step({step}, {steps}): step must be in 1 … {steps}."
            raise OptionError(message, option="step", where=self.name, given=step, expected=(1, steps))
        self.method.after_step(list(self.parts.values()), step, steps)

    def finalize(self) -> None:
        """Runs the method's last change of the adapters, such as the average of experts. Idempotent; most methods have none.

        `veneer.training` calls it after the last step, before the final file is written. The parameters may be replaced by
        smaller ones, so an optimizer or a checkpoint of the run must not be used afterwards. `method` becomes the new config.

        Raises:
            StateError: it is merged.
        """
        if self.merged:
            message = f"'{self.name}' is merged. Call unmerge() before finalize()."
            raise StateError(message, where=self.name, given="merged", expected="unmerged")
        self.method = self.method.finalize(list(self.parts.values()))

    def require_selection(self) -> None:
        """Raises in a forward pass with gradients before `select`.

        Raises:
            NotSelected: the entries to train are not selected.
        """
        if self.method.selects and torch.is_grad_enabled() and not _ALLOWED.get() and not self.is_selected:
            message = (
                f"'{self.name}' ({self.method.name}) has not selected the entries that it trains. Call attachment.select(losses) "
                "with losses of single training samples before the first step, or run without gradients."
            )
            raise NotSelected(message, where=self.name, given=self.method.name, expected="select")
