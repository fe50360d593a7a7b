"""Evolutionary search under a parameter budget, as in NOAH.

Source: Zhang, Zhou, Liu, Neural Prompt Search, 2022, and its code (`evolution.py`): a random population, then generations of
mutations and crossovers of the best, each of a half, filled up with random sub-networks; no sub-network is evaluated twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from veneer.training.loop.seeds import mix

from .space import Space
from .sub_network import SubNetwork

ATTEMPTS = 10
"""Attempts to find a new sub-network, for each one that a generation asks for."""


@dataclass(frozen=True)
class Trial:
    """An evaluated sub-network.

    Args:
        sub: the sub-network. `parameters`: its trainable parameters, without the head.
        val_accuracy, val_loss: of the validation split; None if its training diverged.
    """

    sub: SubNetwork
    parameters: int
    val_accuracy: float | None
    val_loss: float | None

    @property
    def order(self) -> tuple[float, float, int]:
        """Sort key, best first: highest validation accuracy, then lowest loss, then fewest parameters."""
        if self.val_accuracy is None or self.val_loss is None:
            return (1.0, 0.0, self.parameters)
        return (-self.val_accuracy, self.val_loss, self.parameters)


@dataclass(frozen=True)
class Evolution:
    """Options of the search.

    Args:
        trials: number of evaluated sub-networks. `population`: of them in a generation. `parents`: number of best ones that
            mutate and cross.
        mutation: probability that a mutation changes a choice. `seed`: of all random numbers.
    """

    trials: int
    population: int
    parents: int
    mutation: float
    seed: int


def evolve(space: Space, options: Evolution, evaluate: Callable[[SubNetwork], Trial]) -> list[Trial]:
    """Trials of an evolutionary search, in the order of evaluation: a function of the space, the options and the metrics.

    The search ends early if a generation has no new sub-network.
    """
    trials: dict[SubNetwork, Trial] = {}
    for generation in range(options.trials):
        rng = random.Random(mix(options.seed, "search", generation))
        parents = [trial.sub for trial in sorted(trials.values(), key=lambda trial: trial.order)[: options.parents]]
        entrants = _generation(space, options, rng, parents, trials)[: options.trials - len(trials)]
        for sub in entrants:
            trials[sub] = evaluate(sub)
        if not entrants or len(trials) == options.trials:
            break
    return list(trials.values())


def _generation(
    space: Space, options: Evolution, rng: random.Random, parents: Sequence[SubNetwork], known: dict[SubNetwork, Trial]
) -> list[SubNetwork]:
    """New sub-networks of a generation: mutations, crossovers, and random ones for the rest."""
    chosen: dict[SubNetwork, None] = {}

    def add(count: int, propose: Callable[[], SubNetwork]) -> None:
        proposals = (propose() for _ in range(ATTEMPTS * count))
        chosen.update(dict.fromkeys(islice(_new(space, proposals, chosen, known), count)))

    if parents:
        half = options.population // 2
        add(half, lambda: space.mutate(rng.choice(parents), rng, options.mutation))
        if len(parents) > 1:
            add(half, lambda: _cross(space, parents, rng))
    else:
        chosen.update(dict.fromkeys(_new(space, iter(space.initial()), chosen, known)))
    add(max(0, options.population - len(chosen)), lambda: space.sample(rng))
    return list(chosen)


def _cross(space: Space, parents: Sequence[SubNetwork], rng: random.Random) -> SubNetwork:
    """The crossover of two random parents."""
    first, second = rng.sample(parents, 2)
    return space.cross(first, second, rng)


def _new(
    space: Space, proposals: Iterator[SubNetwork], chosen: dict[SubNetwork, None], known: dict[SubNetwork, Trial]
) -> Iterator[SubNetwork]:
    """The proposals within the budget that are neither evaluated nor chosen, each once."""
    yielded = set[SubNetwork]()
    for sub in proposals:
        if sub not in known and sub not in chosen and sub not in yielded and space.has(sub):
            yielded.add(sub)
            yield sub


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest validation accuracy, then the lowest loss, then the fewest parameters, then the first."""
    return min(trials, key=lambda trial: trial.order)


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other one with as few parameters beats in validation accuracy, then loss, by ascending parameters."""
    front: list[Trial] = []
    scored = [trial for trial in trials if trial.val_accuracy is not None]
    for trial in sorted(scored, key=lambda trial: (trial.parameters, trial.order)):
        if not front or trial.order[:2] < front[-1].order[:2]:
            front.append(trial)
    return front
