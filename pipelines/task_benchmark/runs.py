"""Training runs of the benchmark: existing ones are read, and the first seed chooses the learning rate of each row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.atomic_files import write_json
from veneer.injection import OptionError

from ..transfer import TransferConfig, transfer
from .task_images import TaskImages

Options = Mapping[str, Any]
HEAD_ONLY = "linear_probe"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and the record in `result.json`."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        """File of the adapter and the head."""
        return self.folder / "adapter.safetensors"

    @property
    def test(self) -> float:
        """Test accuracy, of a run with several tasks their mean."""
        return float(self.record["test_accuracy"])

    @property
    def validation(self) -> float:
        """Validation accuracy, of a run with several tasks their mean."""
        return float(self.record["val_accuracy"])

    def test_of(self, task: str) -> float:
        """Test accuracy of one task of a run with several."""
        return float(self.record["tasks"][task]["test_accuracy"])

    @property
    def parameters(self) -> int:
        """Trained parameters, with the head."""
        return int(self.record["trainable_parameters"])


class Runs:
    """Trains and reads the runs in a folder.

    Args:
        work: the folder. `images`: the tasks. `seeds`: the first one chooses learning rates.
        rates: learning rates, of which each row uses the one with the highest mean validation accuracy of its runs.
        options: of `veneer transfer`, for all runs; by default without augmentation, because digits have no mirror image.
        few_epochs: epochs of runs with few images. `targets`: the tasks that have few images in turn (default: all).
    Raises:
        OptionError: there is no such task, or the folder has runs with other settings.
    """

    def __init__(
        self,
        work: Path,
        images: TaskImages,
        seeds: Sequence[int],
        rates: Sequence[float],
        options: Options,
        few_epochs: int,
        targets: Sequence[str] | None = None,
    ) -> None:
        self.targets = tuple(targets or images.tasks)
        unknown = sorted({*self.targets} - {*images.tasks})
        if unknown:
            message = f"task_benchmark: no task {', '.join(unknown)}; choose targets among {', '.join(images.tasks)}."
            raise OptionError(message, option="targets", given=self.targets, expected=tuple(images.tasks))
        self.work, self.images, self.seeds, self.few_epochs = work, images, tuple(seeds), few_epochs
        self.options = {"augment": "none", "keep_epoch": "last", **options}
        self.rates, self.chosen = tuple(rates), dict[str, float]()
        data = {"clothes": Path(images.clothes).name, **dataclasses.asdict(images.counts), "targets": list(self.targets)}
        own = {"rates": list(self.rates), "first_seed": self.seeds[0], "few_epochs": few_epochs}
        self.settings = {**self.options, **data, **own}
        self._check_settings()

    def _check_settings(self) -> None:
        settings: Options = self.settings
        file = self.work / "settings.json"
        if not file.is_file():
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(file, settings)
        before = json.loads(file.read_text(encoding="utf-8"))
        for key in sorted({*before, *settings}):
            if before.get(key) != settings.get(key):
                given, expected = settings.get(key), before.get(key)
                message = f"{self.work}: its runs have {key} {expected!r}, not {given!r}; choose another --work."
                raise OptionError(message, option="work", file=file, where=key, given=given, expected=expected)

    def row(self, name: str, seed: int, jobs: Mapping[str, Options], rate_of: str | None = None) -> dict[str, Run]:
        """The runs of a row with one seed, at the learning rate that the row chose with the first seed.

        Args:
            name: of the row. `jobs`: for each run its name and options.
            rate_of: another row, whose learning rate is used (default: that of this row).
        """
        if rate_of is not None:
            self.chosen[name] = self.chosen[rate_of]
        if name not in self.chosen:
            if seed != self.seeds[0]:
                message = f"task_benchmark: row {name} has no learning rate; train seed {self.seeds[0]} before {seed}."
                raise OptionError(message, option="seeds", given=seed, expected=self.seeds[0])
            scores = {rate: self._mean_validation(name, seed, jobs, rate) for rate in self.rates}
            self.chosen[name] = max(scores, key=lambda rate: scores[rate])
        rate = self.chosen[name]
        return {job: self.train(f"{name}/{job}-{rate:g}-{seed}", seed, learning_rate=rate, **jobs[job]) for job in jobs}

    def _mean_validation(self, name: str, seed: int, jobs: Mapping[str, Options], rate: float) -> float:
        runs = [self.train(f"{name}/{job}-{rate:g}-{seed}", seed, learning_rate=rate, **jobs[job]) for job in jobs]
        return sum(run.validation for run in runs) / len(runs)

    def probe(self, name: str, seed: int, **options: Any) -> Run:
        """A run whose head is the logistic regression on fixed features, such as those of adapters in `with_`."""
        return self.train(f"{name}-{seed}", seed, **options, method=HEAD_ONLY, lp_ft=True, epochs=1)

    def train(self, name: str, seed: int, **options: Any) -> Run:
        """Trains one run, or reads its record.

        Raises:
            KeyboardInterrupt: the run was stopped; the same command continues it.
        """
        out = self.work / "runs" / name
        if not (out / "result.json").is_file():
            common: dict[str, Any] = {"seed": seed, "out": out, "resume": out.exists()}
            transfer(TransferConfig(**{**self.options, **common, **options}))
        if not (out / "result.json").is_file():
            raise KeyboardInterrupt
        return Run(out, json.loads((out / "result.json").read_text(encoding="utf-8")))
