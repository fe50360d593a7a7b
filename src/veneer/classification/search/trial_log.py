"""Trials of a search in a file with a JSON line for each, which survives an interruption at any time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer.atomic_files import sync_folder
from veneer.injection.errors import VeneerError

from .evolution import Trial
from .sub_network import SubNetwork

FILE = "trials.jsonl"


class TrialLog:
    """The trials of a run folder. A line is written and synced as a whole; an incomplete last line is removed.

    Args:
        folder: of the run. `names`: of the methods. `settings`: hash of everything that the metrics depend on.
        resume: whether the folder may have trials.
    Raises:
        VeneerError: there are trials and `resume` is False, or they are of other settings or not readable.
    """

    def __init__(self, folder: Path, names: Sequence[str], settings: str, *, resume: bool) -> None:
        self.file, self.names, self.settings = folder / FILE, tuple(names), settings
        self.trials: dict[SubNetwork, Trial] = {}
        for number, record in enumerate(_read(self.file), 1):
            self._add(number, record)
        if self.trials and not resume:
            message = f"{self.file} has {len(self.trials)} trials. Continue them with --resume, or choose another --out."
            raise VeneerError(message, file=self.file, where="trials", given=len(self.trials), expected=0)

    def _add(self, number: int, record: Any) -> None:
        other = record.get("settings") if isinstance(record, dict) else None
        if other != self.settings:
            message = (
                f"{self.file}: line {number} is of a search with other options, data or model. Repeat the options of that search "
                "with --resume, or choose another --out."
            )
            raise VeneerError(message, file=self.file, where=f"line {number}", given=other, expected=self.settings)
        try:
            sub = SubNetwork.from_dict(record["sizes"], self.names)
            self.trials[sub] = Trial(sub, record["parameters"], record["val_accuracy"], record["val_loss"])
        except (KeyError, TypeError) as error:
            message = f"{self.file}: line {number} is not a trial ({error!r}). Delete the line, or choose another --out."
            raise VeneerError(message, file=self.file, where=f"line {number}", given=record, expected="a trial") from error

    def evaluate(self, sub: SubNetwork, parameters: int, measure: Callable[[], tuple[float, float] | None]) -> Trial:
        """The trial of a sub-network, from the file or from `measure`, which returns validation accuracy and loss.

        Metrics that are None or not finite are those of a training that diverged.
        """
        if sub in self.trials:
            return self.trials[sub]
        metrics = measure()
        accuracy, loss = metrics if metrics is not None and math.isfinite(metrics[1]) else (None, None)
        trial = Trial(sub, parameters, accuracy, loss)
        self._append({
            "trial": len(self.trials), "sizes": sub.as_dict(self.names), "parameters": parameters, "val_accuracy": accuracy,
            "val_loss": loss, "settings": self.settings,
        })  # fmt: skip
        self.trials[sub] = trial
        return trial

    def _append(self, record: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab", buffering=0) as file:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            os.fsync(file.fileno())
        sync_folder(self.file.parent)


def _read(file: Path) -> list[Any]:
    """The records of the complete lines; an incomplete last line, of an interrupted write, is cut off the file."""
    if not file.is_file():
        return []
    data = file.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
        os.truncate(file, len(complete))
    try:
        return [json.loads(line) for line in complete.splitlines()]
    except ValueError as error:
        message = f"{file} has a line that is not JSON ({error}). Delete the line, or choose another --out."
        raise VeneerError(message, file=file, where="trials", given="syntax", expected="a JSON object in each line") from error
