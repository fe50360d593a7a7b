"""Training sets of the generations of iPET: images that models label for each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Labeled = tuple[Tensor, Tensor]
"""Indices of images, and their labels; both (images,), int64."""


def training_sets(
    logits: Tensor, counts: Sequence[int], generation: int, growth: float, annotators: float, generator: torch.Generator
) -> list[Labeled]:
    """Images that each model trains on beside the labeled ones, with labels of other models.

    For a model, a random subset of the others is chosen, and the mean of their logits gives each image the most probable class
    and its probability p. With n labeled images, n_c of class c, generation g has n·d^g images: int(n_c·m / n) of class c are
    new, with m = int(n·d^g − n). They are sampled without replacement from the images with this label, in proportion to p; if
    there are too few, all of them are repeated. A class without an image gets none.

    Args:
        logits: (models, images, classes), at least two models. `counts`: n_c of the labeled images. `generation`: g, from 1.
        growth: d, above 1. `annotators`: share of the other models in a subset, above 0, at most 1; at least one model.
    Source: Schick and Schütze, EACL 2021, section 3.4, and `generate_ipet_train_sets` of the authors' code. Deviation: at least
    one annotator, and a class that no image has is left out, where the code does not end.
    """
    total = sum(counts)
    new = int(total * growth**generation - total)
    wanted = [int(count * (new / total)) for count in counts]
    return [_training_set(_others(logits, model, annotators, generator), wanted, generator) for model in range(len(logits))]


def _others(logits: Tensor, model: int, share: float, generator: torch.Generator) -> Tensor:
    """Mean logits (images, classes) of a random subset of the other models."""
    others = [index for index in range(len(logits)) if index != model]
    size = max(1, round(len(others) * share))
    subset = torch.randperm(len(others), generator=generator)[:size].tolist()
    return logits[[others[index] for index in subset]].mean(0)


def _training_set(logits: Tensor, wanted: Sequence[int], generator: torch.Generator) -> Labeled:
    probabilities, labels = logits.softmax(-1).max(-1)
    chosen = []
    for label, size in enumerate(wanted):
        (images,) = (labels == label).nonzero(as_tuple=True)
        if len(images) and size:
            images = images.repeat(-(-size // len(images)))
            chosen.append(images[torch.multinomial(probabilities[images], size, generator=generator)])
    found = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)
    return found, labels[found]
