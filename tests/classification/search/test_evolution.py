"""The evolutionary search: a function of the seed, without repetitions, better than random samples, and its Pareto front."""

from __future__ import annotations

import random

import pytest

from tests.classification.search.tiny_space import tiny_space
from veneer.classification.search.evolution import Evolution, Trial, best_trial, evolve, pareto_front
from veneer.classification.search.space import Space
from veneer.classification.search.spaces import SPACES
from veneer.classification.search.sub_network import SubNetwork

OPTIONS = Evolution(trials=60, population=10, parents=4, mutation=0.2, seed=0)


def metrics(sub: SubNetwork) -> tuple[float, float]:
    """A metric with one best sub-network: `lora` 4 in all blocks, nothing else."""
    distance = sum(abs(size - (4 if m == 0 else 0)) for m, row in enumerate(sub.sizes) for size in row)
    return 1 / (1 + distance), float(distance)


def search(space: Space, options: Evolution = OPTIONS) -> list[Trial]:
    return evolve(space, options, lambda sub: Trial(sub, space.parameters(sub), *metrics(sub)))


@pytest.mark.parametrize("name", SPACES)
def test_trials_are_different_and_a_function_of_the_seed(name: str) -> None:
    space = tiny_space(name)
    trials = search(space)
    assert trials == search(space)
    assert trials != search(space, Evolution(60, 10, 4, 0.2, 1))
    assert len({trial.sub for trial in trials}) == len(trials) == 60
    assert all(space.has(trial.sub) for trial in trials)


@pytest.mark.parametrize("name", SPACES)
def test_no_sub_network_is_evaluated_twice(name: str) -> None:
    space, calls = tiny_space(name), list[SubNetwork]()

    def evaluate(sub: SubNetwork) -> Trial:
        calls.append(sub)
        return Trial(sub, space.parameters(sub), *metrics(sub))

    evolve(space, OPTIONS, evaluate)
    assert len(calls) == len({*calls}) == OPTIONS.trials


def test_more_trials_continue_the_same_search() -> None:
    space = tiny_space("noah")
    assert search(space, Evolution(25, 10, 4, 0.2, 0)) == search(space)[:25]


@pytest.mark.parametrize("name", SPACES)
def test_evolution_beats_random_samples(name: str) -> None:
    """With as many trials, in the mean of four seeds."""
    space, evolved, sampled = tiny_space(name), list[float](), list[float]()
    for seed in range(4):
        rng = random.Random(seed)
        sampled.append(max(metrics(space.sample(rng))[0] for _ in range(150)))
        evolved.append(best_trial(search(space, Evolution(150, 20, 4, 0.2, seed))).val_accuracy or 0.0)
    assert sum(evolved) > 1.1 * sum(sampled)


def test_a_small_space_ends_the_search() -> None:
    space = tiny_space("blocks", tiny_space("blocks").least_parameters())
    trials = search(space)
    assert {trial.sub.text(space.sites.names) for trial in trials} == {
        "vpt 1-0-0-0", "vpt 0-1-0-0", "vpt 0-0-1-0", "vpt 0-0-0-1",
    }  # fmt: skip


def trial(parameters: int, accuracy: float | None, loss: float | None = 1.0) -> Trial:
    return Trial(SubNetwork(((parameters,),)), parameters, accuracy, loss)


def test_pareto_front_and_choice() -> None:
    trials = [
        trial(5, 0.5),
        trial(3, 0.5),
        trial(4, 0.4),
        trial(9, 0.9, 0.3),
        trial(8, 0.9, 0.4),
        trial(7, 0.6),
        trial(1, None, None),
    ]
    assert [(t.parameters, t.val_accuracy) for t in pareto_front(trials)] == [(3, 0.5), (7, 0.6), (8, 0.9), (9, 0.9)]
    assert best_trial(trials) is trials[3]
    assert best_trial([trial(1, None, None), trial(2, 0.0, 9.0)]).parameters == 2


def test_pareto_front_of_random_trials_is_what_no_trial_beats() -> None:
    rng = random.Random(0)
    trials = [trial(rng.randrange(40), rng.randrange(20) / 20, rng.random()) for _ in range(60)]
    front = pareto_front(trials)
    beaten = [t for t in trials if any(o.parameters <= t.parameters and o.order[:2] < t.order[:2] for o in trials)]
    assert {t.parameters for t in front} == {t.parameters for t in trials if t not in beaten}
    assert not [t for t in front if t in beaten]
    assert best_trial(trials) in front
