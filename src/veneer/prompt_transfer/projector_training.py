"""Training of a projector of prompts: by the distance to trained prompts, or by the loss of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .projector import PromptProjector, squared_distance


def minimize_distance(
    projector: PromptProjector, pairs: Sequence[tuple[Tensor, Tensor]], steps: int, learning_rate: float
) -> list[float]:
    """Trains Proj on the mean of ‖Proj(P_s) − P_t‖² over tasks whose prompts P_s and P_t were trained on both models.

    Args:
        pairs: prompts (p, d_s) and (p, d_t) of each task. `steps`: of AdamW, each on all pairs, without weight decay.
    Returns:
        The loss of each step.
    Source: Su et al., NAACL 2022, "distance minimizing".
    """
    optimizer, losses = _optimizer(projector, learning_rate), list[float]()
    for _ in range(steps):
        loss = torch.stack([squared_distance(projector(source), target) for source, target in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def tune_on_task(
    projector: PromptProjector,
    source: Tensor,
    prompt: nn.Parameter,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
) -> list[float]:
    """Trains Proj on the loss L(Proj(P_s)) of a task on the other model, which is frozen.

    The prompt of the model has the projected values in each step, and dL/dP at the prompt is propagated through the projector.
    Afterwards it has the projected values of the last step's weights.

    Args:
        source: P_s (p, d_s). `prompt`: the prompt (p, d_t) of the other model. `loss`: of the model's step, with gradients.
    Returns:
        The loss of each step.
    Source: Su et al., NAACL 2022, "task tuning", and the authors' code.
    """
    optimizer, losses = _optimizer(projector, learning_rate), list[float]()
    for step in range(steps):
        projected = projector(source)
        set_prompt(prompt, projected)
        value = loss(step)
        (gradient,) = torch.autograd.grad(value, [prompt])
        optimizer.zero_grad()
        projected.backward(gradient.to(projected))
        optimizer.step()
        losses.append(float(value.detach()))
    with torch.no_grad():
        set_prompt(prompt, projector(source))
    return losses


def set_prompt(prompt: nn.Parameter, values: Tensor) -> None:
    """Copies values to a prompt of the same shape, without gradients."""
    with torch.no_grad():
        prompt.copy_(values)


def _optimizer(projector: PromptProjector, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.0)
