"""FISH Mask beside its authors' importance of parameters and their selection."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.parity.measure import Row, largest_difference, randn
from tests.parity.models import vits
from tests.parity.oracle import Repository
from veneer.injection import attach

ORACLE = Repository("varunnair18/FISH", "b5bff1e66559f7c865e2f45c1488ae13e193dae2")
METHODS = ("fish_mask",)
RATIO, SAMPLES = 0.1, 6


def rows() -> list[Row]:
    """Selected entries of the MLPs of a ViT, with both scores."""
    return [Row("fish_mask", "selected entries, both scores", max(_difference(score) for score in ("square", "absolute")))]


def _difference(score: str) -> float:
    code = ORACLE.definitions("cifar10-fast/fisher.py", "calculate_the_importance_label")
    model, theirs = vits()
    data = [(randn(1, 3, 32, 32, seed=10 + i), torch.tensor([i % 5])) for i in range(SAMPLES)]
    names = [f"blocks.{d}.mlp.{layer}.weight" for d in range(2) for layer in ("fc1", "fc2")]
    for name, p in theirs.named_parameters():
        p.requires_grad_(name in names)
    parameters = [(name, p) for name, p in theirs.named_parameters() if name in names]
    call: Any = lambda batch: {"logits": theirs(batch["input"])}  # noqa: E731
    call.named_parameters, call.zero_grad = lambda: iter(parameters), theirs.zero_grad
    batches = [{"input": image, "target": label} for image, label in data]
    scores = code.calculate_the_importance_label(call, batches, SAMPLES, "cpu", score)
    flat = torch.cat([scores[name].flatten() for name in names])
    reference = torch.zeros_like(flat)
    reference[flat.topk(int(RATIO * len(flat))).indices] = 1
    tuned = attach(model, "fish_mask", where="mlp.in mlp.out", keep_ratio=RATIO, samples=SAMPLES, score=score)
    tuned.select(F.cross_entropy(model(image), label) for image, label in data)
    shared: Any = next(iter(tuned.parts.values()))[1]
    ours = torch.zeros_like(flat)
    ours[shared.own.indices.long()] = 1
    return largest_difference([(ours, reference)])
