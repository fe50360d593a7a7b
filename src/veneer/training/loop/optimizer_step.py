"""One optimizer step: gradient accumulation, all-reduce, gradient scaling, clipping and update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import TrainConfig
from .distributed import split_rows, sum_gradients
from .errors import TrainError
from .seeds import mix

LossStep = Callable[[int, list[int]], Tensor]
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Gradients:
    """Computes and applies the gradient of a step's mean loss; see `Trainer` for the arguments.

    `scaler` is the gradient scaler of fp16, disabled with other precisions. With `lockstep`, every process runs the same number
    of passes in a step, which gathers the weights of a sharded base model on all of them.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        loss_step: LossStep,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        lockstep: bool = False,
    ) -> None:
        self.config, self.accelerator, self.loss_step = config, accelerator, loss_step
        self.parameters, self.optimizer, self.lockstep = list(parameters), optimizer, lockstep
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")

    def compute(self, step: int, stop: bool) -> tuple[float, bool, float]:
        """Gradients of step `step`'s mean loss over all its samples, on all processes.

        Args:
            stop: whether this process received a stop request.

        Returns:
            The mean loss, whether any process received a stop request, and the L2 norm of the gradient.
        """
        device = self.accelerator.device
        loss = torch.zeros((), device=device)
        batches = [self._batches(rank) for rank in range(self.accelerator.num_processes)]
        own = batches[self.accelerator.process_index]
        for _ in range(len(own), max(map(len, batches)) if self.lockstep else 0):
            self._backward(step, [0])  # the gradients of other processes' rows are cleared
        self.clear()
        for rows in own:
            loss += self._backward(step, rows)
        scalars = torch.stack([loss, torch.tensor(float(stop), device=device)])
        scalars = sum_gradients(self.accelerator, self.parameters, scalars)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        total, stops, size = torch.cat([scalars, norm.to(scalars).reshape(1)]).tolist()
        return total, bool(stops), size

    def _batches(self, rank: int) -> list[list[int]]:
        """The micro-batches of a process."""
        return split_rows(self.config.samples, self.config.batch, rank, self.accelerator.num_processes)

    def _backward(self, step: int, rows: list[int]) -> Tensor:
        """Accumulates the gradient of a micro-batch, weighted by its number of rows; returns its part of the mean loss."""
        dtype = AUTOCAST[self.config.mixed_precision]
        torch.manual_seed(mix(self.config.seed, step, "torch", rows[0]))
        with torch.autocast(self.accelerator.device.type, dtype, enabled=dtype is not None):
            loss = self.loss_step(step, rows)
        if loss.numel() != 1 or not loss.requires_grad:
            raise TrainError(
                f"loss_step returned shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}; expected a scalar with grad",
                where="loss_step",
                given=(tuple(loss.shape), loss.requires_grad),
                expected=((), True),
            )
        part = loss.float().reshape(()) * (len(rows) / self.config.samples)
        self.scaler.scale(part).backward()
        return part.detach()

    def fatal(self, norm: float) -> bool:
        """Whether a gradient norm ends the run. With fp16 an overflow halves the scale, and ends the run at a scale below 1."""
        return not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1)

    def apply(self, step: int, norm: float, after: Callable[[], None] | None = None) -> None:
        """Clips the gradient, whose norm is `norm`, and updates the parameters; with an fp16 overflow the update is skipped.

        torch's global generator is seeded with (seed, step) before the update, for optimizers that sample.

        Args:
            step: step of the run, 0-based.
            after: called after the update, before the gradients are cleared; an overflow clears them first.
        """
        if self.config.max_grad_norm and math.isfinite(norm):
            total = torch.tensor(norm, device=self.accelerator.device)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, total)
        torch.manual_seed(mix(self.config.seed, step, "optimizer"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if after is not None:
            if not math.isfinite(norm):
                self.clear()
            after()
        self.clear()

    def clear(self) -> None:
        """Clears the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
