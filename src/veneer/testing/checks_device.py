"""Checks of a method on an accelerator, without one: see `simulated_accelerator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment

from .case import Case, close, perturb, run, training_loss
from .checks_run import one_of_each
from .simulated_accelerator import DEVICE, on_device, simulated_accelerator

TOLERANCE = 1e-4
"""Relative to the largest value; attention takes another kernel on the device."""


def runs_on_an_accelerator(case: Case) -> None:
    """Attached before or after the model is moved to an accelerator: outputs and gradients as on the CPU, all on the device."""
    case = one_of_each(case)
    model, attachment = case.attached()
    inputs = case.inputs(model, attachment)
    expected = _outputs_and_gradients(model, attachment, inputs)
    with simulated_accelerator():
        model.to(DEVICE)
        for order in ("attached before the move", "attached after the move"):
            got = _outputs_and_gradients(model, attachment, on_device(inputs))
            for name, values in expected.items():
                what = f"{case.method.name}, {order}: {name}"
                assert {t.device.type for t in got[name]} <= {torch.device(DEVICE).type}, f"{what} are on the CPU"
                close([t.cpu() for t in got[name]], values, TOLERANCE, what)
            attachment.detach()
            attachment = case.attach(model)
            perturb(attachment)


def adapters_cause_no_synchronization(case: Case) -> None:
    """The host never waits for an accelerator because of adapters: none of them reads a value in its forward pass."""
    case = one_of_each(case)
    bare, (model, attachment) = case.bare(), case.attached()
    expected = _synchronizations(bare, case.plain(bare))
    got = _synchronizations(model, case.inputs(model, attachment))
    assert got == expected, f"{case.method.name}: synchronizations {got} with adapters, {expected} without"


def _synchronizations(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Synchronizations of the second forward pass, by operator; the first may fill caches."""
    with simulated_accelerator() as accelerator:
        model.to(DEVICE)
        given = on_device(inputs)
        run(model, given)
        accelerator.synchronizations.clear()
        run(model, given)
        return dict(accelerator.synchronizations)


def _outputs_and_gradients(model: nn.Module, attachment: Attachment, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    parameters = list(attachment.parameters())
    gradients = torch.autograd.grad(training_loss(model, attachment, inputs), parameters, allow_unused=True)
    return {"outputs": run(model, inputs), "gradients": [g for g in gradients if g is not None]}


CHECKS: tuple[Callable[[Case], None], ...] = (runs_on_an_accelerator, adapters_cause_no_synchronization)
