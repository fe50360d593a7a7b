"""Iterative stratification: splits of images with several labels that keep the share of each label.

The label with the fewest remaining images is distributed first, each of its images to the split that still needs most images of
this label, then to the one that needs most images in all, then to the first.

Source: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, ECML PKDD 2011, algorithm 1. Deviations: ties
are resolved by order instead of at random, and each created split needs at least one image of a label as long as one remains for
training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def stratify(labels: Sequence[Sequence[int]], shares: Sequence[float]) -> list[int | None]:
    """Split of each image: its index in `shares`, or None for the training split.

    Args:
        labels: of each image, in the order in which images are distributed. `shares`: of the created splits, together below 1.
    """
    everything = _targets(len(labels), shares)
    totals = Counter(label for of_image in labels for label in of_image)
    needed = {label: _targets(count, shares) for label, count in totals.items()}
    remaining = dict.fromkeys(range(len(labels)))
    split_of = [0] * len(labels)
    while remaining:
        counts = Counter(label for image in remaining for label in labels[image])
        rarest = min(counts, key=lambda label: (counts[label], label))
        for image in [each for each in remaining if rarest in labels[each]]:
            split = max(range(len(everything)), key=lambda place: (needed[rarest][place], everything[place], -place))
            split_of[image] = split
            del remaining[image]
            everything[split] -= 1
            for label in labels[image]:
                needed[label][split] -= 1
    return [split - 1 if split else None for split in split_of]


def _targets(count: int, shares: Sequence[float]) -> list[float]:
    """Number of images of the training split, then of each created split."""
    created: list[float] = []
    for share in shares:
        left = count - sum(created) - 1  # one image remains for training
        created.append(min(max(1.0, count * share), max(left, 0.0)) if share else 0.0)
    return [count - sum(created), *created]
