"""The command: counts of the outcomes of malformed files."""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tests.formats.malformed import __doc__ as told
from tests.formats.malformed.verdict import Case, Verdict, judge, memory, ready
from veneer.formats import formats

ROOM = 800  # megabytes of addresses above the start, so that what is allocated from a claim fails


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit the address space to a little above the current size, so that a claimed size cannot be allocated."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int((memory("VmSize") + ROOM) * 2**20), limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def table(verdicts: Sequence[Verdict]) -> str:
    """Outcomes by good file and by mutation, and the most expensive files."""
    words = ("refused", "same", "other", "wrong")
    lines = []
    for title in ("good", "mutation"):
        rows = Counter((getattr(v, title), v.what) for v in verdicts)
        lines.append(f"{title:<34}" + "".join(f"{word:>9}" for word in words))
        for name in sorted({getattr(v, title) for v in verdicts}):
            lines.append(f"{name:<34}" + "".join(f"{rows[name, word]:>9}" for word in words))
        lines.append("")
    total = Counter(v.what for v in verdicts)
    lines.append("total: " + ", ".join(f"{total[word]} {word}" for word in words))
    slowest, largest = max(verdicts, key=lambda v: v.seconds), max(verdicts, key=lambda v: v.megabytes)
    lines.append(f"slowest: {slowest.seconds:.2f} s of the processor ({slowest.number}: {slowest.good}, {slowest.mutation})")
    lines.append(f"most memory: {largest.megabytes:.0f} MB ({largest.number}: {largest.good}, {largest.mutation})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.formats.malformed", description=told)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number to begin with, to go on or to share the work")
    parser.add_argument("--only", type=int, help="the number of one file")
    parser.add_argument("--formats", default="", help="names of formats with commas between, instead of all")
    given = parser.parse_args()
    chosen = [name for name in given.formats.split(",") if name]
    if unknown := set(chosen) - set(formats.names()):
        parser.error(f"no format is called {', '.join(sorted(unknown))}")
    warnings.simplefilter("error")
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as name, ready(Path(name), chosen) as pairs, bounded():
        Random(given.seed).shuffle(pairs)
        began, first = time.monotonic(), memory("VmRSS")
        for number in range(given.first, given.count) if given.only is None else [given.only]:
            case = Case.of(pairs[number % len(pairs)], number, given.seed, Path(name) / "run")
            verdict = judge(case)
            verdicts.append(verdict)
            if verdict.what == "wrong":
                what = f"{verdict.good}, {verdict.mutation}: {verdict.why}"
                print(f"WRONG --seed {given.seed} --only {number}: {what}", flush=True)
        print(table(verdicts))
        spent = f"{time.monotonic() - began:.0f} s; {first:.0f} MB at the start, {memory('VmRSS'):.0f} MB at the end"
        print(f"{len(verdicts)} files, {len(pairs)} pairs of a good file and a mutation, in {spent}")
    return int(any(v.what == "wrong" for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
