"""Order, pairs and ratios of contests, with a fake clock."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from tests.raising import raises
from veneer.benchmarks import table
from veneer.benchmarks.interleaved_timing import Contender, Contest, ContestResult, Ratio, Sample, interleave
from veneer.injection.errors import OptionError


class Clock:
    """A clock that contenders advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Callable[[Any], None]:
        """A contender's `run`, whose successive calls take these seconds."""
        left = list(seconds)

        def run(_: Any) -> None:
            self.now += left.pop(0)

        return run


def test_rounds_rotate_the_order() -> None:
    ran: list[str] = []
    ways = tuple(Contender(name, lambda _, name=name: ran.append(name)) for name in "abc")
    outcome = interleave(Contest("row", "what", ways, ()), rounds=4, warmup=0)
    assert "".join(ran) == "abc" + "bca" + "cab" + "abc"
    assert [(s.contender, s.round) for s in outcome.samples] == [(name, i // 3) for i, name in enumerate(ran)]


def test_ratios_are_paired_within_rounds() -> None:
    clock = Clock()
    fast, slow = Contender("fast", clock.takes(1, 10, 4)), Contender("slow", clock.takes(2, 40, 6))
    outcome = interleave(Contest("row", "what", (fast, slow), (("slow", "fast"),)), rounds=3, warmup=0, clock=clock)
    assert outcome.values() == {"fast": 4, "slow": 6}
    assert outcome.ratios() == [Ratio("slow", "fast", median=2, least=1.5, most=4)]


def test_seconds_per_call_exclude_preparation_and_warmup() -> None:
    clock = Clock()
    prepared: list[int] = []

    def prepare() -> int:
        clock.now += 100
        prepared.append(len(prepared))
        return prepared[-1]

    contest = Contest("row", "what", (Contender("a", clock.takes(50, 50, 1, 3), prepare),), (), calls=2)
    outcome = interleave(contest, rounds=1, warmup=1, clock=clock)
    assert outcome.samples == (Sample("a", 0, 2.0),)
    assert prepared == [0, 1]


def test_zero_rounds_are_an_error() -> None:
    with raises(OptionError, option="rounds", given=0):
        interleave(Contest("row", "what", (), ()), rounds=0)


def test_table_of_ratios_and_single_values() -> None:
    samples = (Sample("a", 0, 3.0), Sample("b", 0, 2.0), Sample("alone", 0, 0.25))
    page = table.page("title", {"cores": 2}, [ContestResult("row", "what is timed", samples, (("a", "b"),))], ["a note"])
    assert "| row | a / b | 1.500 | 1.500 to 1.500 | 3 / 2 s |" in page
    assert "| row | alone | | | 0.25 s |" in page
    assert "**row**: what is timed." in page
    assert "cores 2" in page
    assert "a note." in page


def test_objects_that_the_caller_has_frozen_stay_frozen() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    interleave(Contest("row", "what", (Contender("a", lambda _: None),), ()), rounds=1)
    assert gc.get_freeze_count() >= before > 0
