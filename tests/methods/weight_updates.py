"""Weight updates of a method on small models, against dense weights W + ΔW: outputs, and gradients by the chain rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.selections import at_sites, explicit, plain_gradients, tiny
from veneer.injection import Attachment, attach
from veneer.injection.method import Method
from veneer.testing.case import loss

Change = Callable[[Any, Tensor], Tensor]
"""ΔW of an adapter at its site with weight W, by the equation, differentiable in the adapter's parameters."""


def check_update(
    host: str, name: str, method: Method, change: Change, where: str | None = None, move: Callable[[Any], None] | None = None
) -> Attachment:
    """The loss is that of dense weights W + ΔW, and the gradients are those of ΔW for dL/dW'.

    Args:
        host, name: of the small model. `move`: sets an adapter's tensors; by default random parameters.
    """
    model, samples = tiny(host, name)
    bare = copy.deepcopy(model)
    tuned = attach(model, method, where=where)
    torch.manual_seed(1)
    for _, adapter in tuned.parts.values():
        (move or randomize)(adapter)
    weights = [w.detach() for w in at_sites(tuned, dict(bare.named_parameters()))]
    deltas = [change(adapter, w) for (_, adapter), w in zip(tuned.parts.values(), weights, strict=True)]
    changed = explicit(bare, tuned, [delta.detach() for delta in deltas])
    got = loss(model, samples[0])
    torch.testing.assert_close(got, loss(changed, samples[0]), rtol=1e-5, atol=1e-6)
    assert (got - loss(bare, samples[0])).abs() > 1e-4
    got.backward()
    (of_sample,) = plain_gradients(changed, samples[:1])
    parameters = list(tuned.parameters())
    total = sum((delta * g).sum() for delta, g in zip(deltas, at_sites(tuned, of_sample), strict=True))
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    for p, gradient in zip(parameters, expected, strict=True):
        mine = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(mine, torch.zeros_like(p) if gradient is None else gradient, rtol=1e-4, atol=1e-7)
    return tuned


@torch.no_grad()
def randomize(adapter: nn.Module) -> None:
    """Normal values of standard deviation 0.3 for every parameter."""
    for p in adapter.parameters():
        p.normal_(std=0.3)
