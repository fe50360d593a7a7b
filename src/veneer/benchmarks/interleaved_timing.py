"""Interleaved timing: every round runs each contender once, so that load on the machine affects all of them alike.

On a shared machine absolute seconds vary, while ratios within a round are stable. The order rotates by one position per round, so
that no contender always runs first. Memory does not vary between runs and is measured once.
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
    """One measurement: contender, round, and seconds per call or megabytes; in the order of execution."""

    contender: str
    round: int
    value: float


class Ratio(NamedTuple):
    """Median, minimum and maximum over rounds of the ratio `of / to`. Below 1, `of` is faster or smaller."""

    of: str
    to: str
    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Contender:
    """One implementation of the benchmarked job.

    Args:
        name: in the table.
        run: the timed function, called with the result of `prepare`.
        prepare: called before each timing, not timed.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Contest:
    """Several implementations of the same job to compare.

    Args:
        name: of the row. `what`: description of the timed job.
        contenders: in the order of the first round.
        pairs: (of, to), the ratios to report.
        calls: calls of `run` per timing; more than 1 for jobs that take milliseconds.
        unit: `s` for time, `MB` for the peak memory of a call beyond the memory before it.
    """

    name: str
    what: str
    contenders: tuple[Contender, ...]
    pairs: tuple[tuple[str, str], ...]
    calls: int = 1
    unit: Unit = "s"


@dataclass(frozen=True)
class ContestResult:
    """Measurements of a contest, and their ratios."""

    name: str
    what: str
    samples: tuple[Sample, ...]
    pairs: tuple[tuple[str, str], ...]
    unit: Unit = "s"

    def values(self) -> dict[str, float]:
        """Median of each contender."""
        return {name: statistics.median(self._of(name).values()) for name in dict.fromkeys(s.contender for s in self.samples)}

    def ratios(self) -> list[Ratio]:
        """Ratio of each pair, over the rounds."""
        return [self._ratio(of, to) for of, to in self.pairs]

    def as_json(self) -> dict[str, Any]:
        """Medians, ratios and all measurements, as JSON values."""
        samples, ratios = [s._asdict() for s in self.samples], [r._asdict() for r in self.ratios()]
        summary = {"name": self.name, "what": self.what, "unit": self.unit, "values": self.values()}
        return {**summary, "ratios": ratios, "samples": samples}

    def _of(self, name: str) -> dict[int, float]:
        return {s.round: s.value for s in self.samples if s.contender == name}

    def _ratio(self, of: str, to: str) -> Ratio:
        reference = self._of(to)
        ratios = [value / reference[number] for number, value in self._of(of).items()]
        return Ratio(of, to, statistics.median(ratios), min(ratios), max(ratios))


def interleave(contest: Contest, rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter) -> ContestResult:
    """Runs a contest; one round if it measures memory.

    Args:
        rounds: timings of each contender, at least 1. `warmup`: untimed rounds before them.
        clock: returns seconds.
    Raises:
        OptionError: fewer than one round.
    """
    if rounds < 1:
        raise OptionError(f"bench: rounds is {rounds}; expected at least 1", option="rounds", given=rounds, expected=1)
    if contest.unit == "MB":
        peaks = tuple(Sample(each.name, 0, _peak_memory(each)) for each in contest.contenders)
        return ContestResult(contest.name, contest.what, peaks, contest.pairs, contest.unit)
    samples = []
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()  # excludes millions of objects of imported libraries from the collection before each timing
    try:
        for number in range(-warmup, rounds):
            start = number % len(contest.contenders)
            for contender in contest.contenders[start:] + contest.contenders[:start]:
                seconds = _time(contender, contest.calls, clock)
                if number >= 0:
                    samples.append(Sample(contender.name, number, seconds))
    finally:
        if not frozen:  # else what the caller has frozen would be collected again
            gc.unfreeze()
    return ContestResult(contest.name, contest.what, tuple(samples), contest.pairs)


def _peak_memory(contender: Contender) -> float:
    """Peak memory in megabytes of the second call, because the first may allocate persistent memory."""
    contender.run(contender.prepare())
    prepared = contender.prepare()
    return peak(lambda: contender.run(prepared)) / 1e6


def _time(contender: Contender, calls: int, clock: Callable[[], float]) -> float:
    """Seconds per call, with Python's garbage collector disabled."""
    prepared = contender.prepare()
    gc.collect()
    gc.disable()
    try:
        _synchronize()
        start = clock()
        for _ in range(calls):
            contender.run(prepared)
        _synchronize()
        return (clock() - start) / calls
    finally:
        gc.enable()


def _synchronize() -> None:
    """Waits for pending work of a CUDA device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
