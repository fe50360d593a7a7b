"""Data-parallel training on several processes: rows of each process, and reductions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

if TYPE_CHECKING:
    from .sharded_base import ShardedBase

T = TypeVar("T")


def split_rows(samples: int, batch: int, rank: int, processes: int) -> list[list[int]]:
    """Rows of a step's `samples` that process `rank` computes, in micro-batches of at most `ceil(batch / processes)`.

    The rows of the processes are contiguous, disjoint and complete; with fewer rows than processes, some have none.
    """
    first, last = samples * rank // processes, samples * (rank + 1) // processes
    size = math.ceil(batch / processes)
    return [list(range(row, min(row + size, last))) for row in range(first, last, size)]


@torch.no_grad()
def sum_gradients(accelerator: Accelerator, parameters: Sequence[Tensor], scalars: Tensor) -> Tensor:
    """Sums the gradients in place, and `scalars` (shape `(n,)`), over all processes, in one all-reduce.

    A parameter has a gradient afterwards if any process had one, as with a single process.
    """
    if accelerator.num_processes == 1:
        return scalars
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=scalars.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients] + [present, scalars])
    flat = accelerator.reduce(flat, "sum")
    sizes = [gradient.numel() for gradient in gradients]
    *sums, present, scalars = flat.split([*sizes, len(parameters), len(scalars)])
    for parameter, total, count in zip(parameters, sums, present.tolist(), strict=True):
        if count:
            parameter.grad = total.view(parameter.shape).to(parameter.dtype)
    return scalars


def broadcast_start(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Broadcasts `tensors` from the main process, so that all processes start from the same weights."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            tensor.detach().copy_(broadcast(tensor.detach()))


def on_main(accelerator: Accelerator, action: Callable[[], T], base: ShardedBase | None = None) -> T:
    """Runs `action` on the main process; all processes wait and return its result, or raise its exception.

    Args:
        base: sharded base model that the action runs.
    """
    if accelerator.num_processes == 1:
        return action()
    outcome: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            with contextlib.nullcontext() if base is None else base.lead():
                outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    elif base is not None:
        base.follow()
    broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def whole_weights(base: ShardedBase | None) -> contextlib.AbstractContextManager[None]:
    """Context of `on_main` in which a sharded base model has its whole weights; no effect on another one."""
    return contextlib.nullcontext() if base is None else base.whole()
