"""One optimiser step: losses of the micro-batches, gradients summed over processes, gradient scale, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import TrainConfig
from .distributed import share, sum_gradients
from .errors import TrainError
from .seeds import mix

LossStep = Callable[[int, list[int]], Tensor]
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Gradients:
    """Computes and applies the gradient of a step's mean loss; see `loop.Trainer` for the arguments.

    `scaler` is the gradient scale of fp16; with other precisions it is off and passes everything through.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        loss_step: LossStep,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config, self.accelerator, self.loss_step = config, accelerator, loss_step
        self.parameters, self.optimizer = list(parameters), optimizer
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")

    def compute(self, step: int, stop: bool) -> tuple[float, bool, float]:
        """Gradients of step `step`'s mean loss over all its samples, on all processes.

        Args:
            stop: whether this process was asked to stop.

        Returns:
            the mean loss, whether any process was asked to stop, and the gradient's L2 norm.
        """
        self.clear()
        device = self.accelerator.device
        loss = torch.zeros((), device=device)
        for rows in share(self.config.samples, self.config.batch, self.accelerator.process_index, self.accelerator.num_processes):
            loss += self._backward(step, rows)
        figures = torch.stack([loss, torch.tensor(float(stop), device=device)])
        figures = sum_gradients(self.accelerator, self.parameters, figures)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        total, stops, size = torch.cat([figures, norm.to(figures).reshape(1)]).tolist()
        return total, bool(stops), size

    def _backward(self, step: int, rows: list[int]) -> Tensor:
        """Add the gradient of a micro-batch's share of the mean loss; gives that share."""
        dtype = AUTOCAST[self.config.mixed_precision]
        torch.manual_seed(mix(self.config.seed, step, "torch", rows[0]))
        with torch.autocast(self.accelerator.device.type, dtype, enabled=dtype is not None):
            loss = self.loss_step(step, rows)
        if loss.numel() != 1 or not loss.requires_grad:
            has = "a" if loss.requires_grad else "no"
            raise TrainError(
                f"loss_step gave shape {tuple(loss.shape)} with {has} graph; expected a scalar that depends on weights",
                where="loss_step",
                given=(tuple(loss.shape), loss.requires_grad),
                expected=((), True),
            )
        part = loss.float().reshape(()) * (len(rows) / self.config.samples)
        self.scaler.scale(part).backward()
        return part.detach()

    def fatal(self, norm: float) -> bool:
        """Whether a gradient norm ends the run. With fp16 an overflow only halves the scale, until that falls below 1."""
        return not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1)

    def apply(self, norm: float, then: Callable[[], None] | None = None) -> None:
        """Clip the gradient, whose norm is `norm`, and update the parameters; an overflow of fp16 updates nothing.

        Args:
            then: called after the update, while the gradients are there; after an overflow there are none.
        """
        if self.config.max_grad_norm and math.isfinite(norm):
            total = torch.tensor(norm, device=self.accelerator.device)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, total)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if then is not None:
            if not math.isfinite(norm):
                self.clear()
            then()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
