"""A trial of an optimizer on small parameters: that it trains, and that it resumes exactly from its saved state."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection.errors import VeneerError

from ..errors import TrainError
from .catalog import load_class
from .modes import start_training
from .state import pack, unpack

STEPS = 4
SIDE = 6
"""Largest side of the parameters of a trial."""
EIGHT_BIT_SHAPE = (64, 64)
"""Shape of a further parameter for bitsandbytes, whose state has 8 bits from 4,096 elements."""


def check_resume(name: str, parameters: Sequence[Tensor], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> None:
    """Checks that half of the steps, a new optimizer with the saved state and the other half equal all steps in one run.

    Args:
        parameters: those to train; the trial has one of each number of dimensions, on the same device, and for a class of
            bitsandbytes a larger one.
        make: the optimizer of parameter groups.

    Raises:
        TrainError: the optimizer cannot train such parameters, or its saved state is incomplete.
    """
    shapes = {p.dim(): tuple(min(side, SIDE) for side in p.shape) for p in parameters if p.numel()}
    larger = [EIGHT_BIT_SHAPE] if _is_bitsandbytes(name) else []
    devices = {p.device for p in parameters}
    random = torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"])
    with random, torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(shape, generator=generator).to(parameters[0].device) for shape in (*shapes.values(), *larger)]
        try:
            whole, _ = _run(start, make, range(STEPS), None)
            first, state = _run(start, make, range(STEPS // 2), None)
            resumed, _ = _run(first, make, range(STEPS // 2, STEPS), state)
        except VeneerError:
            raise
        except Exception as error:
            message = f"optimizer {name!r} cannot train these parameters, of dimensions {sorted(shapes)}: {error}"
            raise TrainError(message, where="optimizer", given=name, expected=str(error)) from error
    if not all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)):
        message = (
            f"optimizer {name!r} does not resume exactly: it keeps values outside its state, which checkpoints do not contain. "
            "Choose another one."
        )
        raise TrainError(message, where="resume", given=name, expected="exact")


def _is_bitsandbytes(name: str) -> bool:
    """True for a class of bitsandbytes and its subclasses."""
    return any(cls.__module__.startswith("bitsandbytes.") for cls in load_class(name).__mro__)


def _run(start: Sequence[Tensor], make: Any, steps: range, state: Any) -> tuple[list[Tensor], Any]:
    """Parameters after some steps from `start` with the saved `state`, and the state then."""
    parameters = [nn.Parameter(tensor.clone()) for tensor in start]
    named: dict[str, Tensor] = {str(i): p for i, p in enumerate(parameters)}
    optimizer = make([{"params": parameters, "weight_decay": 0.01, "lr_scale": 1.0, "name": "trial"}])
    if state is not None:
        unpack(optimizer, named, *state)
    start_training(optimizer)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        torch.manual_seed(step)  # as the training loop does before each step
        optimizer.step()
    tensors, values = pack(optimizer, named)
    copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    return [p.detach() for p in parameters], (copies, json.loads(json.dumps(values)))
