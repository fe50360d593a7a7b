"""Forward passes of a training batch: one, or as many as a method asks for, with the consistency loss of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.method import Method
from veneer.injection.training_protocol import Distance


class ForwardPasses:
    """Runs the forward passes of training batches for attached methods.

    Args:
        attached: the trained attachments. `seed`: of the run.
    """

    def __init__(self, attached: Sequence[Attachment] = (), seed: int = 0) -> None:
        self.sampled = [a for a in attached if type(a.method).begin_pass is not Method.begin_pass]
        self.consistent = [a for a in attached if a.method.passes > 1]
        self.comparing = [a for a in attached if type(a.method).compare_passes is not Method.compare_passes]
        self.unlabeled = [a for a in attached if a.method.needs_unlabeled]
        self.count, self.seed = max((a.method.passes for a in attached), default=1), seed

    def __call__(
        self, step: int, compute: Callable[[], Tensor], distance: Distance, loss: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Runs `compute` as often as the methods ask for, or once without gradients.

        If blocks are recomputed in the backward pass (gradient checkpointing), each pass samples its values again first: autograd
        runs the passes backward one after the other, the last first.

        Args:
            step: of the run. `compute`: a forward pass of the batch. `distance`: of two outputs for each batch row.
            loss: of an output, for methods that compare their passes.
        Returns:
            The output of the first pass, and the consistency loss of each batch row, (batch,), or None without one.
        """
        if not torch.is_grad_enabled() or not (self.sampled or self.consistent):
            return compute(), None
        outputs = [self._run(step, number, compute) for number in range(self.count)]
        if loss is not None and self.comparing:
            with torch.no_grad():
                by_pass = torch.stack([loss(output.detach()) for output in outputs])
            for attachment in self.comparing:
                attachment.compare_passes(by_pass)
        losses = [a.consistency_loss(outputs, distance) for a in self.consistent]
        return outputs[0], torch.stack(losses).sum(0) if losses else None

    def without_labels(self, step: int, compute: Callable[[int], Tensor]) -> Tensor | None:
        """The mean loss of a step on images without labels, or None if no method asks for one.

        Args:
            step: of the run. `compute`: a forward pass of the images, in the view with the given number.
        """
        losses = []
        for attachment in self.unlabeled if torch.is_grad_enabled() else ():
            outputs: list[Tensor] = []
            for number in reversed(range(attachment.unlabeled_passes())):
                self._begin(step, number)
                with torch.set_grad_enabled(number == 0):
                    outputs.insert(0, compute(attachment.method.unlabeled_view(number)))
            losses += [attachment.method.unlabeled_loss(outputs).mean()] if outputs else []
        return torch.stack(losses).sum() if losses else None

    def _run(self, step: int, number: int, compute: Callable[[], Tensor]) -> Tensor:
        self._begin(step, number)
        output = compute()
        if self.count > 1 and self.sampled and output.requires_grad:
            output.register_hook(partial(self._begin_again, step, number))
        return output

    def _begin(self, step: int, number: int) -> None:
        for attachment in self.sampled:
            attachment.begin_pass(self.seed, step, number)

    def _begin_again(self, step: int, number: int, gradient: Tensor) -> None:
        self._begin(step, number)
