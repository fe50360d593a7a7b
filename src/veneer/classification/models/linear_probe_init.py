"""Where a fresh head starts: at the logistic regression on the frozen features, so that adapters begin where a probe ends.

From a random head the first gradients that reach the adapters say little, and a short run spends itself on the head.
Source: Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022 (linear probing,
then tuning). Deviation: the probe is solved, not trained by gradient steps, as in Radford et al., Learning Transferable Visual
Models From Natural Language Supervision, ICML 2021, A.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from veneer.injection import Attachment
from veneer.injection.sites import ParamSite, WeightSite

from ..train.batches import Batch

PENALTIES = tuple(10.0 ** (-step / 2) for step in range(2, 15))
"""On the squared weights, of features with a mean squared length of 1: 0.1 to 1e-7, the strong ones first."""

Head = tuple[Tensor, Tensor]


def head_parameters(attached: Sequence[Attachment], path: str) -> dict[str, nn.Parameter]:
    """Parameters that are trained in place of the head's `weight` and `bias`, by these names."""
    parts = (part for a in attached for part in a.parts.values())
    return {
        site.param: adapter.get_parameter("value")
        for site, adapter in parts
        if adapter.replaces and isinstance(site, (WeightSite, ParamSite)) and site.path == path
    }


def takes_first_head(head: nn.Module, attached: Sequence[Attachment], path: str) -> bool:
    """True for a linear head with a bias that is trained whole."""
    return isinstance(head, nn.Linear) and set(head_parameters(attached, path)) == {"weight", "bias"}


@torch.no_grad()
def put_first_head(solved: Head, attached: Sequence[Attachment], path: str) -> None:
    """Start the head there."""
    parameters = head_parameters(attached, path)
    for name, value in zip(("weight", "bias"), solved, strict=True):
        parameters[name].copy_(value)


def solve_head(train: Batch, validation: Batch, classes: int) -> Head:
    """Weight (classes, D) and bias of the multinomial logistic regression min_V,c mean CE(V x + c, y) + λ/2 |V|².

    λ goes from strong to weak, each from the solution before, for as long as the cross-entropy of the validation pictures falls.

    Args:
        train, validation: features (N, D) and labels.
    """
    (x, y), (held_x, held_y) = train, validation
    centre = x.mean(dim=0)
    x, held_x = x - centre, held_x - centre
    length = x.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)
    x, held_x = x / length, held_x / length
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    best, least = (weight, bias), float("inf")
    for penalty in PENALTIES:
        weight, bias = _solved(x, y, weight, bias, penalty)
        loss = cross_entropy(linear(held_x, weight, bias), held_y).item()
        if loss >= least:
            break
        best, least = (weight, bias), loss
    weight = best[0] / length
    return weight, best[1] - weight @ centre


def _solved(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> Head:
    weight, bias = (t.clone().requires_grad_(True) for t in (weight, bias))
    steps = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        steps.zero_grad()
        value = cross_entropy(linear(x, weight, bias), y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    steps.step(loss)
    return weight.detach(), bias.detach()
