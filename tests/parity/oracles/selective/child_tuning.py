"""Child-Tuning-D beside its authors' optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from tests.parity.measure import Row, largest_difference, randn
from tests.parity.models import vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("RunxinXu/ChildTuning", "d0d86557ac5ba9769e008d78bfa957d4d700dae9")
METHODS = ("child_tuning",)
STEPS = 4


def rows() -> list[Row]:
    """Weights after four steps with a mask of the Fisher information."""
    namespace = {"Optimizer": Optimizer, "Iterable": Iterable, "Tuple": tuple, "Callable": Callable, "Bernoulli": None}
    code = ORACLE.definitions("ChildTuningOptimizer.py", "ChildTuningAdamW", **namespace)
    model, theirs = vits()
    tuned = attach(model, "child_tuning", where="mlp.in mlp.out", samples=4, batch=1, max_grad_norm=0.0)
    data = [(randn(1, 3, 32, 32, seed=20 + i), torch.tensor([i % 5])) for i in range(STEPS)]
    tuned.select(F.cross_entropy(model(image), label) for image, label in data)
    own: Any = next(iter(tuned.parts.values()))[1]
    masks, start = {}, 0
    for name in tuned.parts:
        weight = theirs.get_parameter(f"{name}.weight").requires_grad_(True)
        indices = own.own.indices.long() - start
        mask = torch.zeros(weight.numel(), dtype=torch.float64)
        mask[indices[(indices >= 0) & (indices < weight.numel())]] = 1
        masks[weight], start = mask.view_as(weight), start + weight.numel()
    before = [weight.detach().clone() for weight in masks]
    peer = code.ChildTuningAdamW(list(masks), lr=1e-3, eps=1e-8, mode="ChildTuning-D")
    peer.set_gradient_mask(masks)
    optimizer = AdamW(tuned.parameters(), lr=1e-3, eps=1e-30, weight_decay=0.0)
    for group in peer.param_groups:
        group["eps"] = 1e-30
    for image, label in data:
        for net, step in ((model, optimizer), (theirs, peer)):
            step.zero_grad()
            F.cross_entropy(net(image), label).backward()
            step.step()
    ours = [part.weight(old) - old for old, (_, part) in zip(before, tuned.parts.values(), strict=True)]
    changes = [weight.detach() - old for weight, old in zip(masks, before, strict=True)]
    return [
        Row("child_tuning", f"mode D: weight updates of {STEPS} AdamW steps", largest_difference(zip(ours, changes, strict=True)))
    ]
