"""The folder of a run, its checks, and the message of a stopped run."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.injection.errors import OptionError, VeneerError

from ..data.image_io import DataError
from ..loop.trainer import TrainResult
from .phases import read_phase

SHARDS = "shards"
"""Folder of photos from tar files."""
DISPOSABLE = frozenset({"logs", "progress.jsonl", "splits.json", SHARDS})
"""Files that a run writes before training, and that the next start writes again."""


def new_folder(parent: Path, name: str, resume: bool = False) -> Path:
    """The first path that does not exist of `parent/name`, `parent/name-2` and so on.

    Raises:
        OptionError: `resume`, which needs the folder of a run.
    """
    if resume:
        raise OptionError("--resume needs --out: the folder of the run that it continues.", option="out", given=None)
    names = (name if i == 1 else f"{name}-{i}" for i in itertools.count(1))
    return next(parent / n for n in names if not (parent / n).exists())


def run_folder(out: Path | None, resume: bool, *inputs: str | Path | None) -> Path:
    """Creates the folder for results if needed; a finished run in it is not overwritten.

    Args:
        inputs: files and folders that the run reads, which must exist; None for none.
    Raises:
        VeneerError: the folder has a finished run, and `resume` is False. DataError: one of `inputs` does not exist.
    """
    assert out is not None
    for data in inputs:
        if data is not None and not Path(data).expanduser().exists():
            raise DataError(f"{data}: no such file or folder. Check the name.", file=data, given="missing")
    if (out / "result.json").exists() and not resume:
        message = f"{out} has a finished run. Choose another --out, or delete the folder."
        raise VeneerError(message, file=out, where="out", given="finished")
    out.mkdir(parents=True, exist_ok=True)
    return out


@contextmanager
def discard_unused(out: Path | None) -> Iterator[None]:
    """Deletes the folder of a run that fails before its first step, if the run created it and it has only `DISPOSABLE` files.

    Args:
        out: folder of the run, before it is created.
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


def stopped_message(result: TrainResult, steps: int, out: Path) -> str:
    """Message of a stopped run."""
    return (
        f"stopped after step {result.steps} of {steps}; the weights so far are in {out / 'adapter.safetensors'}; "
        f"resume with --resume --out {out}"
    )
