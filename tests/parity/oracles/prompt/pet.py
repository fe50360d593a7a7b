"""PET beside its authors' distillation loss."""

from __future__ import annotations

import torch

from tests.parity.measure import Row, measure, randn
from tests.parity.models import link
from tests.parity.oracle import Repository
from veneer.methods.prompt.class_prompts.pet import PET

ORACLE = Repository("timoschick/pet", "21d32de975a911bfa0261827c9bd23dc4f0e4aa2")
METHODS = ("pet",)


def rows() -> list[Row]:
    """Loss on unlabeled images and its gradient, temperature 2."""
    theirs = ORACLE.definitions("pet/utils.py", "distillation_loss").distillation_loss
    logits = [3 * randn(7, 5, seed=seed) for seed in range(4)]
    ours, reference = (torch.nn.Parameter(logits[0].clone()) for _ in range(2))
    target = torch.stack(logits[1:]).mean(0)
    loss = lambda: PET(temperature=2.0).unlabeled_loss([ours, *logits[1:]]).mean()  # noqa: E731
    return [
        Row(
            "pet",
            "loss of the distillation, gradients",
            measure(loss, lambda: theirs(reference, target, 2.0), [(ours, link(reference))]),
        )
    ]
