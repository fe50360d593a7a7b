"""Time veneer: the LoRA step against the frozen floor and peft, attach on FLUX, the few-photo job with and without caches.

Everything in a row runs by turns in one process and is read as ratios within a round, which hold on a busy machine where
seconds do not. `bench` prints a table and writes JSON; it judges nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from veneer.benchmarks import attaching, denoiser, few_photos, peers
from veneer.benchmarks.contest import Contest, Outcome, interleave
from veneer.benchmarks.shapes import SHAPES, BenchError, Shape

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("veneer", "torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class BenchConfig:
    """What is timed, and how often.

    Args:
        size: `tiny` (seconds; only shows that it runs), `small` (a UNet of SD's real widths, cut to two levels) or `sd15` (the
            whole UNet of SD 1.5 at 32×32 latents).
        rows: `denoiser`, `attach` and `few-photos`; all of them by default.
        rounds: timings of each contender.
        clock: `wall` time, or `cpu` time of this process over all its threads: for one thread on a machine that is shared, for
            what waits for no disk.
        rank: of every LoRA.
        dtype: of the frozen UNet in the denoiser's rows: `float32` or `bfloat16`.
        seed: of weights and inputs.
        base: the few-photo job's base: `shipped`, a folder, a hub name or `tiny`; None takes `tiny` for size `tiny`, else `shipped`.
        photos: folder of pictures for the few-photo job; None draws some.
        out: JSON file for the result; None writes none.

    Raises:
        BenchError: an unknown size, row, dtype or clock, or fewer than one round.
    """

    size: str = "small"
    rows: tuple[str, ...] = ("denoiser", "attach", "few-photos")
    rounds: int = 7
    clock: str = "wall"
    rank: int = 16
    dtype: str = "float32"
    seed: int = 0
    base: str | None = None
    photos: Path | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        known = {"size": SHAPES, "dtype": DTYPES, "clock": CLOCKS}
        for name, table in known.items():
            if getattr(self, name) not in table:
                raise BenchError(f"bench: {name} is {getattr(self, name)!r}; expected one of {', '.join(table)}")
        if not self.rows or not set(self.rows) <= set(ROWS):
            raise BenchError(f"bench: rows are {', '.join(self.rows) or 'none'}; expected some of {', '.join(ROWS)}")
        if self.rounds < 1 or self.rank < 1:
            raise BenchError(f"bench: rounds is {self.rounds} and rank is {self.rank}; expected at least 1")


@dataclass(frozen=True)
class BenchResult:
    """What was timed, where, and what came out. `str()` is the table."""

    config: BenchConfig
    environment: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Everything, with each timing in the order of running."""
        rows = [
            {
                "name": o.name,
                "what": o.what,
                "seconds": o.seconds(),
                "ratios": [r._asdict() for r in o.ratios()],
                "samples": [s._asdict() for s in o.samples],
            }
            for o in self.outcomes
        ]
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.config).items() if key not in PATHS}
        return {"environment": self.environment, "config": settings, "notes": list(self.notes), "rows": rows}

    def __str__(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.environment.items()]
        lines.append(f"clock: {self.config.clock}, rounds: {self.config.rounds}")
        for outcome in self.outcomes:
            lines += ["", f"{outcome.name} ({outcome.what})"]
            lines += [f"  {seconds * 1000:10.1f} ms  {name}" for name, seconds in outcome.seconds().items()]
            lines += [f"  {r.median:10.3f} ×   {r.of} / {r.to}  ({r.least:.3f} to {r.most:.3f})" for r in outcome.ratios()]
        return "\n".join([*lines, *(f"\nnote: {note}" for note in self.notes)])


PATHS = ("photos", "out")
"""Settings that name places on this machine; results are for others to read."""


def bench(config: BenchConfig) -> BenchResult:
    """Run the rows one after the other, the contenders of each by turns.

    Raises:
        BenchError: contenders that would do different work.
    """
    shape = SHAPES[config.size]
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as scratch:
        outcomes = []
        for row in config.rows:
            for contest in ROWS[row](config, shape, Path(scratch)):
                outcomes.append(interleave(contest, config.rounds, clock=CLOCKS[config.clock]))
    notes = () if peers.has_peft() else (peers.ABSENT,)
    result = BenchResult(config, environment(), tuple(outcomes), notes)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    return result


def _denoiser(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return denoiser.contests(shape, config.rank, DTYPES[config.dtype], config.seed)


def _attach(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return attaching.contests(shape, config.rank)


def _few_photos(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    base = config.base or ("tiny" if config.size == "tiny" else "shipped")
    return few_photos.contests(load(base), config.photos, shape, config.rank, config.seed, scratch)


ROWS: dict[str, Callable[[BenchConfig, Shape, Path], list[Contest]]] = {
    "denoiser": _denoiser,
    "attach": _attach,
    "few-photos": _few_photos,
}


def load(base: str) -> Any:
    """The few-photo job's pipeline: `tiny`, or what `veneer.bases.load` takes."""
    if base == "tiny":
        from veneer.testing.pipelines import tiny_pipeline

        return tiny_pipeline("sd")
    from veneer import bases

    return bases.load(base)


def environment() -> dict[str, Any]:
    """Versions, threads and the class of machine; not its name."""
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="veneer bench", description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default=BenchConfig.size)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=BenchConfig.rows)
    parser.add_argument("--rounds", type=int, default=BenchConfig.rounds)
    parser.add_argument("--clock", choices=CLOCKS, default=BenchConfig.clock)
    parser.add_argument("--rank", type=int, default=BenchConfig.rank)
    parser.add_argument("--dtype", choices=DTYPES, default=BenchConfig.dtype)
    parser.add_argument("--seed", type=int, default=BenchConfig.seed)
    parser.add_argument("--base", help="of the few-photo job: shipped, a folder, a hub name or tiny")
    parser.add_argument("--photos", type=Path, help="folder of pictures for the few-photo job; some are drawn if not given")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = vars(parser.parse_args(arguments))
    print(bench(BenchConfig(**{**given, "rows": tuple(given["rows"])})))


if __name__ == "__main__":
    main()
