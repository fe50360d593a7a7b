"""Operations of an `Attachment` that a training loop calls around forward passes and after the last step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import StateError
from ..method import Adapter, Method
from ..sites import Site
from ..training_protocol import Distance


class TrainingSteps:
    """Base of `Attachment`: forward passes of a training batch, and the end of training."""

    name: str
    method: Method
    parts: dict[str, tuple[Site, Adapter]]
    merged: bool

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
