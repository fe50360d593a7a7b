"""The folder of a run: a new name, its checks, and the words of a run that was stopped."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.injection.errors import VeneerError

from ..data.image_io import DataError
from ..loop.trainer import TrainResult
from .phases import read_phase

DISPOSABLE = frozenset({"logs", "progress.jsonl", "splits.json"})
"""Files that a run writes before it trains, and that its next start writes again."""


def new_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or `parent/name-2` and so on: the first that is not there."""
    names = (name if i == 1 else f"{name}-{i}" for i in itertools.count(1))
    return next(parent / n for n in names if not (parent / n).exists())


def run_folder(out: Path | None, resume: bool, data: str | Path | None = None) -> Path:
    """The folder for results, made if it is not there; an earlier, finished run in it is not overwritten.

    Args:
        data: file or folder that the run reads. If it is not there, no folder is made.
    Raises:
        VeneerError: it holds a finished run, and `resume` is False. DataError: no such data.
    """
    assert out is not None
    if data is not None and not Path(data).expanduser().exists():
        raise DataError(f"{data}: no such file or folder. Check the name.", file=data, given="missing")
    if (out / "result.json").exists() and not resume:
        message = f"{out} holds a finished run. Choose another --out, or delete it."
        raise VeneerError(message, file=out, where="out", given="finished")
    out.mkdir(parents=True, exist_ok=True)
    return out


@contextmanager
def discard_unused(out: Path | None) -> Iterator[None]:
    """Delete the folder of a run that fails before its first step, if the run made it and it holds only `DISPOSABLE` files.

    Args:
        out: of the run, before it is made.
    """
    assert out is not None
    existed = out.exists()
    try:
        yield
    except Exception:
        if not existed and out.is_dir() and {path.name for path in out.iterdir()} <= DISPOSABLE:
            phase = read_phase(out / "progress.jsonl")
            if phase is None or phase.phase != "training":
                shutil.rmtree(out, ignore_errors=True)
        raise


def stopped(result: TrainResult, steps: int, out: Path) -> str:
    """What is said of a run that was stopped."""
    return (
        f"stopped after step {result.steps} of {steps}; what was learnt so far is in {out / 'adapter.safetensors'}; "
        f"go on with --resume --out {out}"
    )
