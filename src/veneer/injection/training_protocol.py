"""What a method may ask of a training loop: a penalty, forward passes, a schedule, the task, a change at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from .sites import Site

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance of the outputs of two forward passes for each batch row, (batch,): a KL divergence of logits, a squared error."""


class TrainingProtocol:
    """Base of `Method`: forward passes of a training batch, its task, and the end of training. The defaults ask for nothing.

    A method with `needs_tasks` has the option `tasks`, names of tasks, and computes another function for each of them. It
    implements `select_task`. Other methods share their parameters among all tasks.

    A method with `needs_unlabeled` has steps on images without labels. It implements `unlabeled_passes` and `unlabeled_loss`.
    """

    needs_tasks: ClassVar[bool] = False
    needs_unlabeled: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """Forward passes of each training batch. With two or more, `consistency_loss` of their outputs is added to the loss.

        All passes have the same inputs, noise, timesteps and targets; dropout differs. The loss is that of the first.
        """
        return 1

    def begin_pass(self, adapters: Iterable[tuple[Site, Any]], seed: int, step: int, number: int) -> None:
        """Runs before each training forward pass: samples what the pass uses, such as the expert of each site.

        A pure function of its arguments, so that a resumed run, other processes and recomputed blocks sample the same values.
        Tensors of an earlier pass must not be modified in place, because its backward pass may need them.

        Args:
            seed: of the run. `step`: of the run, from 0. `number`: of the pass in its step, from 0.
        """
        return None

    def consistency_loss(self, outputs: Sequence[Tensor], distance: Distance) -> Tensor:
        """Loss of each batch row, (batch,), that is added to the loss of a batch; called only with `passes` above 1.

        Args:
            outputs: logits or predictions of the passes. `distance`: of two outputs.
        """
        raise NotImplementedError(f"{type(self).__name__} has several passes and does not implement consistency_loss")

    def unlabeled_passes(self, adapters: Iterable[tuple[Site, Any]]) -> int:
        """Forward passes of the next step if it has images without labels instead of a labeled batch, else 0.

        `begin_pass` runs before each of them. The first has gradients and runs last. Only classifiers ask.
        """
        return 0

    def unlabeled_view(self, number: int) -> int:
        """Number of the random crop of the images without labels that a pass reads; the same number is the same pixels."""
        return 0

    def unlabeled_loss(self, outputs: Sequence[Tensor]) -> Tensor:
        """Loss of each image without a label, (batch,), of the logits of the `unlabeled_passes`."""
        raise NotImplementedError(f"{type(self).__name__} has passes without labels and does not implement unlabeled_loss")

    def generation_starts(self, steps: int) -> tuple[int, ...]:
        """Steps, from 0, that begin a generation: models that train on images which those of the generation before have labeled.

        Empty without generations. The models take turns: step t trains model t mod `models_in_turn`. Only classifiers ask.

        Args:
            steps: of the whole run.
        """
        return ()

    @property
    def models_in_turn(self) -> int:
        """Number of the models of a generation."""
        return 1

    def training_sets(
        self, logits: Tensor, counts: Sequence[int], generation: int, generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """For each model of a generation, indices of images without labels, and the labels with which it trains on them.

        Args:
            logits: (models, images, classes) by the models of the generation before. `counts`: labeled images of each class.
            generation: from 1. `generator`: of random numbers, on the CPU.
        """
        raise NotImplementedError(f"{type(self).__name__} has generations and does not implement training_sets")

    def begin_generation(self, adapters: Iterable[tuple[Site, Any]]) -> None:
        """Initializes the models of a generation again, after those of the one before have labeled images."""
        return None

    def compare_passes(self, adapters: Iterable[tuple[Site, Any]], losses: Tensor) -> None:
        """Called with the losses (passes,) of the forward passes of each micro-batch, without gradients, if it is overridden.

        For methods that try candidates, one in each pass, and choose the best in `after_step`. Only classifiers call it.
        """
        return None

    def schedule_end(self, steps: int) -> int:
        """Step, from 1, at which the method's own schedule has ended, such as that of pruning; 0 without one.

        A classifier's best epoch is selected among those that end there or later.

        Args:
            steps: of the whole run.
        """
        return 0

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Runs once after the last step, before the adapters are saved: averages experts or heads. Idempotent.

        Checkpoints of a run are written before it, so that a resumed run is exact.

        Returns:
            The config with which `build` makes adapters of the new shapes: what the file contains.
        """
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        """The option `tasks` of a method with `needs_tasks`; empty for other methods."""
        return tuple(getattr(self, "tasks", ())) if self.needs_tasks else ()

    def select_task(self, adapters: Iterable[tuple[Site, Any]], index: int) -> None:
        """Selects the task of the following forward passes. Writes buffers only, so that nothing is compiled again.

        Args:
            index: in the option `tasks`.
        """
        return None

    def materialize(self, adapters: Iterable[tuple[Site, Any]], index: int) -> Self:
        """Replaces parameters that are generated for each task by those of one task.

        Args:
            index: in the option `tasks`.
        Returns:
            The config with which `build` makes such adapters.
        """
        return self

    def penalty(self, adapters: Iterable[tuple[Site, Any]]) -> Tensor | None:
        """A differentiable penalty that is added to the loss, or None. See `Attachment.penalty`."""
        return None

    def after_step(self, adapters: Iterable[tuple[Site, Any]], step: int, steps: int) -> None:
        """Runs after each optimizer step: a schedule, pruning. See `Attachment.after_step`.

        A pure function of the adapters' tensors, their gradients, `step` and `steps`, so that a resumed run is the same: state is
        kept in buffers that are saved, or that `Adapter.training_buffers` names. Uses no random numbers.
        """
        return None
