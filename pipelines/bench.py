"""Benchmarks of veneer: training steps, attach, load, merge and switch against the base model, peft or diffusers.

The contenders of a row run interleaved in one process and are reported as ratios within a round, which stay valid on a busy
machine, unlike seconds. `bench` has no pass or fail.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from veneer.benchmarks import (
    attaching,
    caching,
    conditional,
    denoiser,
    family,
    freezing,
    loading,
    merging,
    peers,
    side_networks,
    starting,
    switching,
    table,
)
from veneer.benchmarks.environment import environment
from veneer.benchmarks.interleaved_timing import Contest, ContestResult, interleave
from veneer.benchmarks.shapes import SHAPES, BenchError, Shape

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOTTLENECK = 64
"""Width of the bottlenecks in the row `conditional`."""
PLACES = ("photos", "out", "base")
"""Settings with local paths, which are left out of the published results."""


@dataclass(frozen=True)
class BenchConfig:
    """Configuration of `veneer bench` and its defaults.

    Args:
        size: `tiny` (seconds, only a smoke test), `small` (a UNet of SD's widths, cut to two levels) or `sd15` (the whole UNet of
            SD 1.5 at 32×32 latents).
        latent: side of the UNet's input in latents (an eighth of the pixels), divisible by 8 (default: that of `size`).
        rows: benchmarks to run: `denoiser` (training step of a LoRA), `family` (training steps of its variants),
            `side-networks` (training steps of LST and DTL on a ViT), `conditional` (blocks on some tokens only, as `coda` has
            them), `freezing` (training steps with frozen leading blocks, as `autofreeze` has them), `attach` (a LoRA), `start`
            (attaching DoRA), `load` (a file), `merge` (into the weights),
            `switch` (between adapters) or `few-photos` (a whole `veneer personalize`) (default: all).
        rounds: timings of each implementation, interleaved.
        clock: `wall` time, or `cpu` time of all threads of this process, for one thread on a shared machine.
        rank: rank of the LoRAs.
        dtype: dtype of the frozen UNet.
        seed: seed of weights and inputs.
        base: base model of the few-photo job: `bundled`, a folder, a hub name or `tiny` (default: `tiny` with size `tiny`, else
            `bundled`).
        photos: folder of images for the few-photo job (default: generated images).
        out: JSON file for the result; the table is written beside it, as `.md` (default: print only).

    Raises:
        BenchError: an unknown size, row, dtype or clock, or fewer than one round.
    """

    size: Literal["tiny", "small", "sd15"] = "small"
    latent: int | None = None
    rows: tuple[str, ...] = (
        *("denoiser", "family", "side-networks", "conditional", "freezing"),
        *("attach", "start", "load", "merge", "switch", "few-photos"),
    )
    rounds: int = 7
    clock: Literal["wall", "cpu"] = "wall"
    rank: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    base: str | None = None
    photos: Path | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        known: dict[str, dict[str, Any]] = {"size": SHAPES, "dtype": DTYPES, "clock": CLOCKS}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise self._wrong(name, tuple(allowed), f"one of {', '.join(allowed)}")
        if not self.rows or not set(self.rows) <= set(ROWS):
            raise self._wrong("rows", tuple(ROWS), f"some of {', '.join(ROWS)}")
        if self.latent is not None and (self.latent < 8 or self.latent % 8):
            raise self._wrong("latent", 8, "a multiple of 8")
        for name in ("rounds", "rank"):
            if getattr(self, name) < 1:
                raise self._wrong(name, 1, "at least 1")

    def _wrong(self, name: str, expected: Any, words: str) -> BenchError:
        given = getattr(self, name)
        return BenchError(f"bench: {name}: {given!r}; expected {words}", where=name, given=given, expected=expected)


@dataclass(frozen=True)
class BenchResult:
    """Configuration, environment and measurements of a benchmark. `str()` is the page with the table."""

    config: BenchConfig
    environment: dict[str, Any]
    outcomes: tuple[ContestResult, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON values: environment, configuration, and every measurement in the order of running."""
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.config).items() if key not in PLACES}
        rows = [outcome.as_json() for outcome in self.outcomes]
        return {"environment": self.environment, "config": settings, "notes": list(self.notes), "rows": rows}

    def __str__(self) -> str:
        config = self.config
        title = f"veneer bench: size {config.size}, {config.rounds} rounds, {config.clock} time"
        return table.page(title, self.environment, self.outcomes, self.notes)


def bench(config: BenchConfig) -> BenchResult:
    """Runs the rows one after the other with interleaved contenders; prints each row as it ends, then the environment.

    Raises:
        BenchError: contenders that would do different work.
        VeneerError: the base model or the photos of the few-photo row do not exist; nothing is measured.
    """
    if "few-photos" in config.rows:
        caching.check(_base(config), config.photos)
    shape, outcomes = SHAPES[config.size], list[ContestResult]()
    if config.latent is not None:
        shape = replace(shape, latent=config.latent)
    print(table.HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as scratch:
        for row in config.rows:
            for contest in ROWS[row](config, shape, Path(scratch)):
                outcomes.append(interleave(contest, config.rounds, clock=CLOCKS[config.clock]))
                print("\n".join(table.lines(outcomes[-1])), flush=True)
    notes = () if peers.has_peft() else (peers.ABSENT,)
    result = BenchResult(config, environment(), tuple(outcomes), notes)
    print("\n".join(["", *(f"{key}: {value}" for key, value in result.environment.items()), *notes]))
    if config.out is not None:
        _write(config.out, result)
    return result


def _base(config: BenchConfig) -> str:
    return config.base or ("tiny" if config.size == "tiny" else "bundled")


def _write(out: Path, result: BenchResult) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(str(result), encoding="utf-8")


def _denoiser(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return denoiser.contests(shape, config.rank, DTYPES[config.dtype], config.seed)


def _attach(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return attaching.contests(shape, config.rank)


def _family(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return family.contests(shape, config.rank, DTYPES[config.dtype], config.seed)


def _side_networks(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return side_networks.contests(shape, config.rank, DTYPES[config.dtype], config.seed)


def _conditional(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return conditional.contests(shape, BOTTLENECK, DTYPES[config.dtype], config.seed)


def _freezing(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return freezing.contests(shape, DTYPES[config.dtype], config.seed)


def _start(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return starting.contests(shape, config.rank, DTYPES[config.dtype], config.seed)


def _load(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return loading.contests(shape, config.rank, scratch)


def _merge(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return merging.contests(shape, config.rank, DTYPES[config.dtype], config.seed)


def _switch(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return switching.contests(shape, config.rank, DTYPES[config.dtype], config.seed)


def _few_photos(config: BenchConfig, shape: Shape, scratch: Path) -> list[Contest]:
    return caching.contests(caching.load(_base(config)), config.photos, shape, config.rank, config.seed, scratch)


ROWS: dict[str, Callable[[BenchConfig, Shape, Path], list[Contest]]] = {
    "denoiser": _denoiser,
    "family": _family,
    "side-networks": _side_networks,
    "conditional": _conditional,
    "freezing": _freezing,
    "attach": _attach,
    "start": _start,
    "load": _load,
    "merge": _merge,
    "switch": _switch,
    "few-photos": _few_photos,
}


if __name__ == "__main__":
    from veneer.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
