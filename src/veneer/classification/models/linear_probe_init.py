"""Initialization of a fresh head with the linear probe: the logistic regression on the frozen features.

With a random head the first gradients of the adapters are uninformative, and a short run mostly trains the head.
Source: Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022 (linear probing,
then tuning). Deviation: the probe is solved, not trained by gradient steps, as in Radford et al., Learning Transferable Visual
Models From Natural Language Supervision, ICML 2021, A.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from veneer.injection import Attachment
from veneer.injection.sites import ParamSite, WeightSite

from ..objectives.objective import Objective
from ..objectives.single_label import SINGLE_LABEL
from ..train.batches import Batch

PENALTIES = tuple(10.0 ** (-step / 2) for step in range(2, 15))
"""L2 penalties for features with a mean squared norm of 1: 0.1 to 1e-7, strongest first."""

Head = tuple[Tensor, Tensor]


def head_parameters(attached: Sequence[Attachment], path: str) -> dict[str, nn.Parameter]:
    """Parameters that are trained in place of the head's `weight` and `bias`, by these names."""
    parts = (part for a in attached for part in a.parts.values())
    return {
        site.param: adapter.get_parameter("value")
        for site, adapter in parts
        if adapter.replaces and isinstance(site, (WeightSite, ParamSite)) and site.path == path
    }


def accepts_probe_init(head: nn.Module, attached: Sequence[Attachment], path: str) -> bool:
    """True for a linear head whose weight and bias are both trained."""
    return isinstance(head, nn.Linear) and set(head_parameters(attached, path)) == {"weight", "bias"}


@torch.no_grad()
def init_head(solved: Head, attached: Sequence[Attachment], path: str) -> None:
    """Copies a solved weight and bias into the trained head."""
    parameters = head_parameters(attached, path)
    for name, value in zip(("weight", "bias"), solved, strict=True):
        parameters[name].copy_(value)


def solve_head(train: Batch, validation: Batch, classes: int, objective: Objective = SINGLE_LABEL) -> Head:
    """Weight (classes, D) and bias of the logistic regression min_V,c L(V x + c, y) + λ/2 |V|².

    L is the loss of the objective: the cross-entropy of a multinomial regression, or of several labels per image the mean
    binary cross-entropy of one regression per class. λ decreases along `PENALTIES`, each solution initialized with the previous
    one, while L falls on the validation images.

    Args:
        train, validation: features (N, D) and targets.
    """
    (x, y), (x_val, y_val) = train, validation
    center = x.mean(dim=0)
    x, x_val = x - center, x_val - center
    length = x.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)
    x, x_val = x / length, x_val / length
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    best, least = (weight, bias), float("inf")
    for penalty in PENALTIES:
        weight, bias = _fit(x, y, weight, bias, penalty, objective)
        loss = objective.loss(linear(x_val, weight, bias), y_val).item()
        if loss >= least:
            break
        best, least = (weight, bias), loss
    weight = best[0] / length
    return weight, best[1] - weight @ center


def _fit(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, penalty: float, objective: Objective) -> Head:
    weight, bias = (t.clone().requires_grad_(True) for t in (weight, bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = objective.loss(linear(x, weight, bias), y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
