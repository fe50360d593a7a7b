"""Timing by turns: every round runs each contender once, so that whatever slows the machine slows all of them.

Absolute seconds on a shared machine say little; the ratio of two that ran within the same round says much. The order turns
by one place a round, so that nobody always runs first. Memory is the same for every run, and is weighed once.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from veneer.injection.errors import OptionError
from veneer.training.report.memory_profile import peak

Unit = Literal["s", "MB"]


class Sample(NamedTuple):
    """One measurement, in the order of running: who, in which round, seconds a call or megabytes."""

    contender: str
    round: int
    value: float


class Ratio(NamedTuple):
    """`of / to` within each round: the middle and both ends. Below 1, `of` takes less."""

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
        unit: `s` for time, `MB` for the peak of memory above what is there before a call.
    """

    name: str
    what: str
    contenders: tuple[Contender, ...]
    pairs: tuple[tuple[str, str], ...]
    calls: int = 1
    unit: Unit = "s"


@dataclass(frozen=True)
class Outcome:
    """What was measured in a contest, and the ratios that follow."""

    name: str
    what: str
    samples: tuple[Sample, ...]
    pairs: tuple[tuple[str, str], ...]
    unit: Unit = "s"

    def values(self) -> dict[str, float]:
        """Contender to its median."""
        return {name: statistics.median(self._of(name).values()) for name in dict.fromkeys(s.contender for s in self.samples)}

    def ratios(self) -> list[Ratio]:
        """One for each pair, over the rounds."""
        return [self._ratio(of, to) for of, to in self.pairs]

    def as_json(self) -> dict[str, Any]:
        """Medians, ratios and every measurement."""
        samples, ratios = [s._asdict() for s in self.samples], [r._asdict() for r in self.ratios()]
        told = {"name": self.name, "what": self.what, "unit": self.unit, "values": self.values()}
        return {**told, "ratios": ratios, "samples": samples}

    def _of(self, name: str) -> dict[int, float]:
        return {s.round: s.value for s in self.samples if s.contender == name}

    def _ratio(self, of: str, to: str) -> Ratio:
        below = self._of(to)
        paired = [value / below[turn] for turn, value in self._of(of).items()]
        return Ratio(of, to, statistics.median(paired), min(paired), max(paired))


def interleave(contest: Contest, rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter) -> Outcome:
    """Run a contest; of memory, one round.

    Args:
        rounds: timings of each contender, at least 1. `warmup`: rounds before them that do not count.
        clock: seconds.
    Raises:
        OptionError: for fewer rounds.
    """
    if rounds < 1:
        raise OptionError(f"bench: rounds is {rounds}; expected at least 1", option="rounds", given=rounds, expected=1)
    if contest.unit == "MB":
        weighed = tuple(Sample(each.name, 0, _weigh(each)) for each in contest.contenders)
        return Outcome(contest.name, contest.what, weighed, contest.pairs, contest.unit)
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


def _weigh(contender: Contender) -> float:
    """Megabytes of a second call: the first may make what stays."""
    contender.run(contender.prepare())
    prepared = contender.prepare()
    return peak(lambda: contender.run(prepared)) / 1e6


def _time(contender: Contender, calls: int, clock: Callable[[], float]) -> float:
    """Seconds a call, with Python's garbage collector waiting."""
    prepared = contender.prepare()
    gc.collect()
    gc.disable()
    try:
        _wait()
        began = clock()
        for _ in range(calls):
            contender.run(prepared)
        _wait()
        return (clock() - began) / calls
    finally:
        gc.enable()


def _wait() -> None:
    """Until a CUDA device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
