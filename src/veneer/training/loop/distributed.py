"""Several processes that train as one: who computes what, and sums over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

T = TypeVar("T")


def share(samples: int, batch: int, rank: int, processes: int) -> list[list[int]]:
    """Rows of a step's `samples` that process `rank` computes, in micro-batches of at most `ceil(batch / processes)`.

    The shares are contiguous, disjoint and together all rows; with fewer rows than processes some shares are empty.
    """
    first, last = samples * rank // processes, samples * (rank + 1) // processes
    size = math.ceil(batch / processes)
    return [list(range(row, min(row + size, last))) for row in range(first, last, size)]


@torch.no_grad()
def sum_gradients(accelerator: Accelerator, parameters: Sequence[Tensor], figures: Tensor) -> Tensor:
    """Sum the gradients in place, and `figures` (shape `(n,)`), over all processes, in one message.

    A parameter has a gradient afterwards if any process had one: what a single process would see.
    """
    if accelerator.num_processes == 1:
        return figures
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=figures.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients] + [present, figures])
    flat = accelerator.reduce(flat, "sum")
    sizes = [gradient.numel() for gradient in gradients]
    *sums, present, figures = flat.split([*sizes, len(parameters), len(figures)])
    for parameter, total, count in zip(parameters, sums, present.tolist(), strict=True):
        if count:
            parameter.grad = total.view(parameter.shape).to(parameter.dtype)
    return figures


def share_start(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Overwrite `tensors` with the main process's, so that all start from the same weights."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            tensor.detach().copy_(broadcast(tensor.detach()))


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on the main process; all processes wait and get its result, or raise its exception."""
    if accelerator.num_processes == 1:
        return action()
    outcome: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]
