"""PET beside its authors' distillation loss, and labels of iPET beside their training sets."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity.measure import Row, measure, randn
from tests.parity.models import link
from tests.parity.oracle import Repository, options
from veneer.methods.prompt.class_prompts._generations import training_sets
from veneer.methods.prompt.class_prompts.pet import PET

ORACLE = Repository("timoschick/pet", "21d32de975a911bfa0261827c9bd23dc4f0e4aa2")
METHODS = ("pet",)


def rows() -> list[Row]:
    """Loss on unlabeled images and its gradient, temperature 2; images and labels of the next generation."""
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
        ),
        Row(
            "pet",
            "iPET: images that the other models label for the next generation, their labels",
            measure(_our_sets, _their_sets, [], gradients=False),
        ),
    ]


CLASSES, COUNTS, GROWTH = ("0", "1", "2"), (2, 3, 4), 3.0


def _logits() -> Tensor:
    """Of three models for 18 images, whose largest logits are of 4, 6 and 8 images in all: every sample has all of them."""
    labels = torch.tensor([label for label, count in enumerate(COUNTS) for _ in range(2 * count)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return randn(3, len(labels), 3) + 20 * torch.nn.functional.one_hot(labels, 3)


def _our_sets() -> Tensor:
    sets = training_sets(_logits(), COUNTS, 1, GROWTH, 1.0, torch.Generator().manual_seed(0))
    return torch.stack([_sorted(zip(images.tolist(), labels.tolist(), strict=True)) for images, labels in sets])


def _their_sets() -> Tensor:
    namespace: dict[str, Any] = {
        "random": random, "deepcopy": deepcopy, "List": list, "LogitsList": object, "InputExample": object,
        "logger": options(info=lambda text: None), "softmax": ORACLE.definitions("pet/utils.py", "softmax").softmax,
    }  # fmt: skip
    code = ORACLE.definitions("pet/modeling.py", "_draw_examples_by_label_probability", **namespace)
    namespace["_draw_examples_by_label_probability"] = code._draw_examples_by_label_probability
    theirs = ORACLE.definitions("pet/modeling.py", "generate_ipet_train_set", **namespace).generate_ipet_train_set
    logits, sets = _logits(), []
    total = sum(COUNTS)
    new = int(total * GROWTH - total)
    for model in range(3):
        others = [options(logits=logits[other].tolist(), score=1) for other in range(3) if other != model]
        images = [options(image=index, label=None, logits=None) for index in range(logits.shape[1])]
        wanted = [int(count * (new / total)) for count in COUNTS]
        found = theirs(others, [*CLASSES], images, wanted, 1.0, "mean", -1, random.Random(0), np.random.RandomState(0))
        sets.append(_sorted((each.image, int(each.label)) for each in found))
    return torch.stack(sets)


def _sorted(pairs: Any) -> Tensor:
    """Pairs of image and label in order, (images, 2)."""
    return torch.tensor(sorted(pairs), dtype=torch.float64)
