"""Muon for matrices and convolutions: momentum, then the nearest orthogonal matrix as the update.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale that matches AdamW's
step size is that of Liu et al., "Muon is scalable for LLM training" (2025). Convolutions count as matrices
(out, in * kh * kw).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration X <- aX + (bA + cA^2)X with A = XX^T: singular values go to about 1.

    Args:
        matrix: (rows, columns).
        steps: iterations.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(torch.bfloat16)
    x = x / (x.float().norm() + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; every parameter needs two dimensions or more."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer, grad = state["momentum"], parameter.grad
        assert grad is not None
        buffer.lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(buffer, group["momentum"]).reshape(len(grad), -1)
        update = orthogonalize(direction, group["steps"])
        scale = 0.2 * max(update.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


EDGES = ("embedding", "conv_in", "conv_out", "conv1.weight.stem", "head", "proj_out_")
"""Substrings of the names of matrices that AdamW optimizes."""
TIMES, SLOWLY = "time_emb_proj", 0.01
"""Substring of the names of time embedding projections, and the factor of their learning rate."""


def optimizers(module: nn.Module, muon_lr: float, adam_lr: float, decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and convolutions; AdamW for embeddings, first and last layers, norms and biases.

    The projections of the time embedding, which scale and shift every residual block, get 1 % of AdamW's learning rate: the
    embedding is large and mostly the same at all timesteps, so that a few steps at the full rate shift all activations of a
    block far below zero, where SiLU has no gradient.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    slow: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        edge = parameter.ndim < 2 or any(part in name for part in EDGES)
        (slow if TIMES in name else others if edge else matrices).append(parameter)
    groups = [{"params": others}] + ([{"params": slow, "lr": SLOWLY * adam_lr}] if slow else [])
    return [
        Muon(matrices, muon_lr, weight_decay=decay),
        torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.98), weight_decay=decay / 10),
    ]
