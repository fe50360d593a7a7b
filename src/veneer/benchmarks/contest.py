"""Timing by turns: every round runs each contender once, so that whatever slows the machine slows all of them.

Absolute seconds on a shared machine say little; the ratio of two that ran within the same round says much. The order turns
by one place a round, so that nobody always runs first.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """One timing, in the order of running: who, in which round, seconds a call."""

    contender: str
    round: int
    seconds: float


class Ratio(NamedTuple):
    """`of / to` within each round: the middle and both ends. Below 1, `of` is the faster."""

    of: str
    to: str
    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    Args:
        name: in the table.
        run: the timed call, given what `prepare` made.
        prepare: untimed, before each timing.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Contest:
    """The same job done in several ways.

    Args:
        name: of the row. `what`: what is timed, for the reader.
        contenders: in the order of the first round.
        pairs: (of, to), the ratios to report.
        calls: calls of `run` in one timing; more than 1 for what takes milliseconds.
    """

    name: str
    what: str
    contenders: tuple[Contender, ...]
    pairs: tuple[tuple[str, str], ...]
    calls: int = 1


@dataclass(frozen=True)
class Outcome:
    """The timings of a contest, and the ratios that follow from them."""

    name: str
    what: str
    samples: tuple[Sample, ...]
    pairs: tuple[tuple[str, str], ...]

    def seconds(self) -> dict[str, float]:
        """Contender to its median seconds a call."""
        return {name: statistics.median(self._of(name).values()) for name in dict.fromkeys(s.contender for s in self.samples)}

    def ratios(self) -> list[Ratio]:
        """One for each pair, over the rounds."""
        return [self._ratio(of, to) for of, to in self.pairs]

    def as_json(self) -> dict[str, Any]:
        """Medians, ratios and every timing."""
        samples, ratios = [s._asdict() for s in self.samples], [r._asdict() for r in self.ratios()]
        return {"name": self.name, "what": self.what, "seconds": self.seconds(), "ratios": ratios, "samples": samples}

    def _of(self, name: str) -> dict[int, float]:
        return {s.round: s.seconds for s in self.samples if s.contender == name}

    def _ratio(self, of: str, to: str) -> Ratio:
        below = self._of(to)
        paired = [seconds / below[turn] for turn, seconds in self._of(of).items()]
        return Ratio(of, to, statistics.median(paired), min(paired), max(paired))


def interleave(contest: Contest, rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter) -> Outcome:
    """Run a contest.

    Args:
        rounds: timings of each contender, at least 1. `warmup`: rounds before them that do not count.
        clock: seconds.
    Raises:
        ValueError: for fewer rounds.
    """
    if rounds < 1:
        raise ValueError(f"bench: rounds is {rounds}; expected at least 1")
    samples = []
    gc.collect()
    gc.freeze()  # what is there already, millions of objects of the imported libraries, is not walked before each timing
    try:
        for turn in range(-warmup, rounds):
            start = turn % len(contest.contenders)
            for contender in contest.contenders[start:] + contest.contenders[:start]:
                seconds = _time(contender, contest.calls, clock)
                if turn >= 0:
                    samples.append(Sample(contender.name, turn, seconds))
    finally:
        gc.unfreeze()
    return Outcome(contest.name, contest.what, tuple(samples), contest.pairs)


def _time(contender: Contender, calls: int, clock: Callable[[], float]) -> float:
    """Seconds a call, with Python's garbage collector waiting."""
    prepared = contender.prepare()
    gc.collect()
    gc.disable()
    try:
        began = clock()
        for _ in range(calls):
            contender.run(prepared)
        return (clock() - began) / calls
    finally:
        gc.enable()
