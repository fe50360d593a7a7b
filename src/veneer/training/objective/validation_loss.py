"""Loss on held-out photos at fixed timesteps and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.injection.errors import OptionError

from ..data.buckets import BucketPlan, Placement, covering_size
from ..data.dataset import Example, PhotoDataset
from ..data.photo_folder import Photo
from ..data.photo_source import PhotoSource
from ..loop.optimizer_step import AUTOCAST
from ..loop.seeds import mix
from ..report.previews import sampling_mode
from .denoising_loss import DenoisingLoss
from .objectives import Flow, Objective

LEVELS = 4
"""Number of timesteps at which the loss of each photo is measured."""


@dataclass(frozen=True)
class ValidationScore:
    """Loss on held-out photos after some steps.

    Args:
        step: finished steps.
        loss: mean over all photos.
        by_concept: mean over the photos of each concept.
    """

    step: int
    loss: float
    by_concept: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as a line of `progress.jsonl` has them."""
        return {"step": self.step, "validation_loss": self.loss, "validation_loss_by_concept": dict(self.by_concept)}


class ValidationLoss:
    """Mean loss on held-out photos, a pure function of the weights: same crops, captions, noise and timesteps at each call.

    Photos are cropped at the center and not flipped, captions are those of the photos or the first template, without dropout and
    augmentation, and the timesteps are the middles of `LEVELS` equal intervals.

    Args:
        loss: loss of the run. `sources`: held-out photos; their first resolution is used. `concepts`: concept of each source.
        mixed_precision: autocast dtype of the run, `no`, `bf16` or `fp16`.
    Raises:
        OptionError: no photos.
    """

    def __init__(
        self, loss: DenoisingLoss, sources: Sequence[PhotoSource], concepts: Sequence[str], mixed_precision: str = "no"
    ) -> None:
        if not any(source.photos for source in sources):
            raise OptionError("validation: no photos; expected at least one.", option="validation", given=0, expected=1)
        self.family, self.dtype = loss.family, AUTOCAST[mixed_precision]
        dataset = PhotoDataset.from_sources(sources, loss.family.multiple, loss.dataset.seed)
        self.loss = replace(loss, dataset=dataset, seed=mix(loss.seed, "validation"))
        self._examples = [
            (concept, _example(dataset, source, photo, loss.family.multiple, index))
            for source, concept in zip(sources, concepts, strict=True)
            for index, photo in enumerate(source.photos)
        ]

    def measure(self, step: int) -> ValidationScore:
        """Measures the loss. Modes of the modules and the random state are restored.

        Args:
            step: finished steps.
        """
        losses_of: dict[str, list[float]] = {}
        autocast = torch.autocast(self.family.device.type, self.dtype, enabled=self.dtype is not None)
        with sampling_mode(self.family.pipe), torch.no_grad(), autocast:
            for concept, example in self._examples:
                timesteps = fixed_timesteps(self.loss.objective)
                losses = [self.loss.losses(level, [example], t.reshape(1)) for level, t in enumerate(timesteps)]
                losses_of.setdefault(concept, []).append(float(torch.cat(losses).mean()))
        everything = [value for values in losses_of.values() for value in values]
        means = {concept: sum(values) / len(values) for concept, values in losses_of.items()}
        return ValidationScore(step, sum(everything) / len(everything), means)


def fixed_timesteps(objective: Objective, levels: int = LEVELS) -> Tensor:
    """The middles of `levels` equal intervals of timesteps, (levels,): int64 indices, or float32 σ in a flow model's range."""
    middles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    if isinstance(objective, Flow):
        return (objective.low + middles * (objective.high - objective.low)).float()
    return (middles * objective.steps).long()


def loss_with_measurements(
    loss: Callable[[int, Sequence[int]], Tensor], every: int, measure: Callable[[int], object]
) -> Callable[[int, list[int]], Tensor]:
    """The loss of a run that calls `measure` before the first loss of every `every`-th step, on each process.

    Args:
        measure: takes the number of finished steps.
    """
    last = [-1]

    def loss_step(step: int, rows: list[int]) -> Tensor:
        if step % every == 0 and last[0] != step:
            last[0] = step
            measure(step)
        return loss(step, rows)

    return loss_step


def write_score(path: Path, score: ValidationScore, done: int, total: int) -> None:
    """Appends a score to `progress.jsonl`; a full disk does not end a run.

    Args:
        done, total: finished steps, and steps of the run.
    """
    line = json.dumps({"phase": "training", "done": done, "total": total, **score.as_dict()})
    try:
        with path.open("a") as file:
            file.write(f"{line}\n")
    except OSError:
        return


def read_scores(path: Path) -> list[ValidationScore]:
    """The scores in a `progress.jsonl`, sorted by step; for steps repeated after a resume, the latest."""
    scores: dict[int, ValidationScore] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            by_concept = dict(record["validation_loss_by_concept"])
            score = ValidationScore(int(record["step"]), float(record["validation_loss"]), by_concept)
        except (ValueError, TypeError, KeyError):
            continue
        scores[score.step] = score
    return [scores[step] for step in sorted(scores)]


def validation_lines(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for a terminal: the validation loss at the first and the last measurement, and its minimum.

    Args:
        scores: as `ValidationScore.as_dict` returns them; without any, there is no line.
    """
    if not scores:
        return []
    first, last, least = scores[0], scores[-1], min(scores, key=lambda score: score["validation_loss"])
    return [
        f"validation loss: {first['validation_loss']:.4f} at step {first['step']}, {last['validation_loss']:.4f} at step "
        f"{last['step']}; lowest {least['validation_loss']:.4f} at step {least['step']}"
    ]


def _example(dataset: PhotoDataset, source: PhotoSource, photo: Photo, multiple: int, index: int) -> Example:
    plan = BucketPlan(source.resolutions[0], multiple, source.min_side, source.max_side, not source.buckets, source.upscale)
    bucket = plan.choose(photo.size)
    resized = covering_size(photo.size, bucket)
    window = Placement(resized, bucket, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2, False)
    return dataset.crop_example(photo, source, window, source.captions.longest(photo.caption)[0], index)
