"""Diff pruning beside its authors' gates and their hand-written gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.measure import Row, largest_difference, randn
from tests.parity.oracle import Repository
from veneer.methods.selective.entries._gated_update import GatedUpdate

ORACLE = Repository("dguo98/DiffPruning", "085fa7d9e2bcbcd19f705a08b1c0c6c74c54bada")
METHODS = ("diff_pruning",)
LOWER, UPPER, PENALTY = -1.5, 1.5, 0.01


def rows() -> list[Row]:
    """Losses and gradients of 20 samples of the gates of one weight."""
    code = ORACLE.definitions("examples/run_glue_diffpruning.py", "concrete_stretched")
    weight, inputs = randn(20, 30), randn(7, 30, seed=2)
    ours = GatedUpdate("x", (20, 30), (1, 1), 5.0, LOWER, UPPER).double().train()
    with torch.no_grad():
        ours.delta.copy_(randn(20, 30, seed=3))
        ours.logits.copy_(randn(20, 30, seed=4))
        assert ours.group_logits is not None
        ours.group_logits.fill_(0.3)
    samples = [_sample(code.concrete_stretched, ours, weight, inputs, seed) for seed in range(20)]
    sides = [[torch.stack(tensors) for tensors in zip(*(sample[i] for sample in samples), strict=True)] for i in (0, 1)]
    return [Row("diff_pruning", "a weight, 20 samples: losses, gradients", largest_difference(zip(*sides, strict=True)))]


def _loss(weight: Tensor, inputs: Tensor) -> Tensor:
    return ((inputs @ weight.T).tanh() ** 2).mean()


def _sample(gate: Any, ours: Any, weight: Tensor, inputs: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of ours and of the authors' code, for the same noise."""
    delta, logits, group = (tensor.detach() for tensor in (ours.delta, ours.logits, ours.group_logits))
    torch.manual_seed(seed)
    group_gate, group_slope = gate(group, LOWER, UPPER)
    gates, slope = gate(logits, LOWER, UPPER)
    total = (weight + group_gate * gates * delta).requires_grad_()
    loss = _loss(total, inputs)
    loss.backward()
    one, all_of = (tensor.clone().requires_grad_() for tensor in (logits, group))
    penalty = PENALTY * (torch.sigmoid(one).sum() + torch.sigmoid(all_of).sum())  # log(−lower / upper) is 0
    penalty.backward()
    gradients = [
        total.grad * (gates * group_gate),
        total.grad * (delta * group_gate) * slope + one.grad,
        torch.sum(total.grad * (delta * gates) * group_slope).view(1, 1) + all_of.grad,
    ]
    torch.manual_seed(seed)
    ours.group_noise, ours.noise = _noise(group), _noise(logits)
    ours.zero_grad()
    mine = _loss(ours.weight(weight), inputs) + PENALTY * ours.expected_open()
    mine.backward()
    own = [tensor.grad.clone() for tensor in (ours.delta, ours.logits, ours.group_logits)]
    return [mine.detach(), *own], [(loss + penalty).detach(), *(gradient.detach() for gradient in gradients)]


def _noise(logits: Tensor) -> Tensor:
    u = torch.zeros_like(logits).uniform_().clamp_(1e-4, 0.9999)
    return u.log() - (1 - u).log()
