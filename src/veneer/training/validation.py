"""Measurements of the validation loss in a run: when, and where they are recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor

from .data.run_photos import RunPhotos
from .loop.disk_space import optional
from .loss_plot import LOSS_PLOT, write_loss_plot
from .objective.validation_loss import ValidationLoss, ValidationScore, loss_with_measurements, read_scores, write_score
from .report.progress import Progress, read_progress
from .report.tracking import record_scores

if TYPE_CHECKING:
    from .data.photo_source import PhotoSource
    from .objective.denoising_loss import DenoisingLoss
    from .personalization_config import PersonalizeConfig


class Validation:
    """Validation loss before the first step, at an interval and after the last step, in `progress.jsonl`, the trackers and
    `loss.png`.

    Args:
        validation_loss: the loss on held-out photos. `loss`: the loss of the run.
        config: of the run. `out`: its folder.
        accelerator: processes of the run; all of them measure, and the main one records.
        sharded: whether the base model is sharded, so that all processes have to run its passes together.
    """

    def __init__(
        self,
        validation_loss: ValidationLoss,
        loss: DenoisingLoss,
        config: PersonalizeConfig,
        out: Path,
        accelerator: Accelerator,
        sharded: bool,
    ) -> None:
        self.validation_loss, self.config, self.out, self.accelerator, self.sharded = (
            validation_loss,
            config,
            out,
            accelerator,
            sharded,
        )
        self.steps = config.loop().steps
        self.every = config.validation_every or max(1, self.steps // 10)
        self._loss = loss_with_measurements(loss, self.every, self.record)

    @classmethod
    def of_run(
        cls,
        photos: RunPhotos,
        source: Callable[[Any], PhotoSource],
        loss: DenoisingLoss,
        config: PersonalizeConfig,
        out: Path,
        accelerator: Accelerator,
        sharded: bool,
    ) -> Validation | None:
        """The validation of a run; None without held-out photos.

        Args:
            source: returns the `PhotoSource` of a part of the photos.
        """
        if not photos.held_out:
            return None
        sources = [source(part) for part in photos.held_out]
        concepts = [part.table.concept or "" for part in photos.held_out]
        precision = config.mixed_precision
        return cls(ValidationLoss(loss, sources, concepts, precision), loss, config, out, accelerator, sharded)

    def loss_step(self, step: int, rows: list[int]) -> Tensor:
        """The loss of the run; measures the validation loss first if it is due."""
        return self._loss(step, rows)

    def record(self, step: int) -> ValidationScore:
        """Measures and records the validation loss after some steps."""
        score = self.validation_loss.measure(step)
        if self.accelerator.is_main_process:
            write_score(self.out / "progress.jsonl", score, step, self.steps)
            concepts = {f"validation_loss/{concept}": loss for concept, loss in score.by_concept.items()}
            record_scores({"validation_loss": score.loss, **(concepts if len(concepts) > 1 else {})}, step)
        return score

    def after(self, on_step: Callable[[Progress], object]) -> Callable[[Progress], None]:
        """`on_step` of a trainer; also measures after the last step, while the trackers are open."""

        def call(progress: Progress) -> None:
            on_step(progress)
            if progress.step == progress.steps and not self.sharded:
                self.record(progress.step)

        return call

    def finish(self, steps: int, notes: list[str]) -> list[dict[str, Any]]:
        """Writes the plot of a finished run. Returns all measurements as JSON values.

        Args:
            notes: warnings of the run, to which a full disk adds one.
        """
        if self.sharded:
            self.record(steps)
        scores, progress = read_scores(self.out / "progress.jsonl"), read_progress(self.out / "progress.jsonl")
        optional(self.out, LOSS_PLOT, lambda: write_loss_plot(self.out / LOSS_PLOT, progress, scores), notes)
        return [score.as_dict() for score in scores]
