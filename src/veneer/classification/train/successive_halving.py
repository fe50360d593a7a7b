"""Successive halving: in each round the candidates share the same budget, and the better half enters the next round.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016, algorithm 1.
Deviations: candidates are trained again from the start in each round, with a complete learning-rate schedule of the round's
length, because accuracy at the peak of a schedule understates high rates; half of an odd number is rounded up; and except in
the last round, scores within one standard error are tied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Validation metrics of a candidate in one round.

    Args:
        accuracy: 0 to 1; 0 if the training diverged. `loss`: mean cross-entropy.
        rate: learning rate, which breaks ties.
    """

    accuracy: float
    loss: float
    rate: float


def round_sizes(candidates: int) -> list[int]:
    """Number of candidates in each round: n, ⌈n/2⌉, … until two are left; one round for a single candidate.

    >>> round_sizes(7)
    [7, 4, 2]
    """
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def round_steps(candidates: int, budget: int) -> list[int]:
    """Optimizer steps of each candidate in each round: ⌊budget / (candidates in the round · rounds)⌋, at least 1.

    Args:
        budget: optimizer steps of all candidates and rounds together.

    >>> round_steps(7, 7 * 96)
    [32, 56, 112]
    """
    sizes = round_sizes(candidates)
    return [max(1, budget // (size * len(sizes))) for size in sizes]


def best(scores: Sequence[Score]) -> int:
    """Index of the candidate with the highest accuracy, then the lowest loss, then the first: the choice of the last round."""
    return min(range(len(scores)), key=lambda i: (-scores[i].accuracy, scores[i].loss, i))


def rank(scores: Sequence[Score], images: int) -> list[int]:
    """Indices of the candidates of an earlier round, best first.

    The order is that of the accuracy, in which the candidates within one standard error √(p (1 − p) / n) of the best remaining
    accuracy p are tied. The highest learning rate of a tie is the best, because short runs favor rates that are too low for
    longer ones; at equal rates, the lowest loss is. A candidate that diverged is the last of its tie.

    Args:
        images: n, number of validation images.
    Source: for the standard error, Breiman et al., Classification and Regression Trees, 1984, section 3.4.3; for the bias of
        short runs, Wu et al., Understanding Short-Horizon Bias in Stochastic Meta-Optimization, ICLR 2018.
    """
    remaining, order = list(range(len(scores))), list[int]()
    while remaining:
        highest = max(scores[i].accuracy for i in remaining)
        error = math.sqrt(highest * (1 - highest) / images)
        tied = [i for i in remaining if scores[i].accuracy >= highest - error]
        first = min(tied, key=lambda i: (math.isinf(scores[i].loss), -scores[i].rate, scores[i].loss, -scores[i].accuracy, i))
        remaining.remove(first)
        order.append(first)
    return order
