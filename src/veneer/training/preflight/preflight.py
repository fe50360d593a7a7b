"""Preflight of a run: trainable parameters, estimated cost, and checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from veneer.injection.errors import VeneerError

from ..data.captions import Captions
from ..data.photo_checks.findings import PhotoFinding
from ..data.photo_folder import Photo
from ..loop.config import TrainConfig
from ..loop.disk_space import free_bytes
from . import checks
from .checks import Concern
from .estimates import Estimate, estimate
from .memory_size import free_memory

if TYPE_CHECKING:
    from veneer.injection.attachment.attachment import Attachment
    from veneer.injection.attachment.report import Report

    from ..families import Family
    from ..loop.optimizers import ParameterGroup
    from ..report.previews import PreviewSettings

__all__ = ["Concern", "Estimate", "Preflight", "PreflightError", "preflight"]


class PreflightError(VeneerError):
    """A run that cannot work; the message lists all errors, and `given` has them as `Concern`."""


@dataclass(frozen=True)
class Preflight:
    """Result of `preflight`.

    Args:
        reports: coverage of each attachment: sites per block, trainable parameters.
        photos: summary of the photos. `estimate`: the cost, or None if errors prevent a trial step.
        concerns: errors first, then warnings, then notes.
    """

    reports: tuple[Report, ...]
    photos: str
    estimate: Estimate | None
    concerns: tuple[Concern, ...]

    @property
    def errors(self) -> tuple[Concern, ...]:
        """The concerns that prevent the run."""
        return tuple(c for c in self.concerns if c.severity == "error")

    @property
    def warnings(self) -> tuple[Concern, ...]:
        """The probable mistakes."""
        return tuple(c for c in self.concerns if c.severity == "warning")

    def text(self) -> str:
        """Lines for a terminal."""
        cost = "cost: unknown because of the errors below" if self.estimate is None else f"cost: {self.estimate}"
        return "\n".join(["trainable parameters:", *map(str, self.reports), self.photos, cost, *map(str, self.concerns)])

    def check(self) -> None:
        """Raises if there are errors.

        Raises:
            PreflightError: with all errors, and what to do.
        """
        if self.errors:
            raise PreflightError(
                "preflight checks failed:\n" + "\n".join(f"- {c.about}: {c.message}" for c in self.errors), given=self.errors
            )


def preflight(
    attachments: Sequence[Attachment],
    config: TrainConfig,
    photos: Sequence[Photo],
    family: Family,
    concept: str,
    *,
    resolution: int | None = None,
    prompts: Sequence[str] | None = None,
    groups: Sequence[ParameterGroup] | None = None,
    default_rates: Mapping[str, float] | None = None,
    processes: int = 1,
    folder: Path | None = None,
    measure: bool = True,
    images: int = 0,
    previews: int = 0,
    sampling: PreviewSettings | None = None,
    loading: float = 0.0,
    findings: Sequence[PhotoFinding] = (),
) -> Preflight:
    """Checks a run and estimates its cost. Weights, gradients and the random state are restored.

    Args:
        attachments: trainable attachments on the family's pipeline.
        config: settings of the loop. `photos`: from `find_photos`, with class images. `concept`: trigger token or class
            label of photos without their own.
        resolution: side of the images in pixels (default: that of the base model).
        prompts: texts besides the captions, such as templates and the prompts of previews.
        groups: parameter groups of the trainer. `default_rates`: method name to its default learning rate on this base model.
        processes: number of processes. `folder`: folder of checkpoints, for the check of disk space.
        measure: measure two passes of a micro-batch; if False, estimate from shapes and the speed of a matrix product.
        images, previews: number of images for evaluation and previews. `sampling`: their settings.
        loading: seconds since the start of the run. `findings`: of `check_photos`, which become warnings.
    """
    side = resolution or family.resolution
    default = "" if any(photo.concept for photo in photos) else concept
    concepts = list(dict.fromkeys(photo.concept for photo in photos if photo.concept)) or [concept]
    texts = [*concepts, *_captions(photos, default), *(prompts or ())]
    concerns = [
        *checks.sites(attachments),
        *checks.learning_rates(attachments, config, groups, default_rates),
        *checks.steps(config, photos),
        *checks.images(photos, side, default),
        *checks.findings(findings),
        *checks.side(side, family),
        *(each for word in concepts for each in checks.concept_word(attachments, family, word, photos)),
        *checks.prompts(family, texts),
    ]

    def measured() -> Estimate:
        factor = 2 if any(photo.is_prior for photo in photos) else 1
        rows, samples = (math.ceil(count / processes) * factor for count in (config.batch, config.samples))
        return estimate(
            attachments, config, family, side, rows, samples, texts, measure, images=images, previews=previews, sampling=sampling,
            loading=loading,
        )  # fmt: skip

    cost, capacity = _cost(concerns, measured, config, family.tower, folder)
    order = ("error", "warning", "note")
    concerns = sorted([*concerns, *capacity], key=lambda concern: order.index(concern.severity))
    return Preflight(tuple(a.report() for a in attachments), _photo_summary(photos, side, config), cost, tuple(concerns))


def _cost(
    concerns: Sequence[Concern], measured: Callable[[], Estimate], config: TrainConfig, tower: nn.Module, folder: Path | None
) -> tuple[Estimate | None, list[Concern]]:
    """The cost of a run, None if errors or too little memory prevent a trial step, and concerns about memory and disk space."""
    if any(concern.severity == "error" for concern in concerns):
        return None, []
    try:
        cost = measured()
    except torch.OutOfMemoryError as error:
        return None, [Concern("memory", f"a trial step ran out of memory: {str(error).splitlines()[0]}", "error")]
    return cost, list(_check_capacity(cost, config, tower, folder))


def _captions(photos: Sequence[Photo], concept: str) -> list[str]:
    """The longest captions of the photos."""
    return [text for p in photos if p.caption for text in Captions(p.concept or concept).longest(p.caption)]


def _photo_summary(photos: Sequence[Photo], resolution: int, config: TrainConfig) -> str:
    own = [photo for photo in photos if not photo.is_prior]
    if not own:
        return "photos: none"
    small = min(own, key=lambda photo: min(photo.size)).size
    prior = f", {len(photos) - len(own)} class images" if len(own) < len(photos) else ""
    views = config.steps * config.samples / len(own)
    return (
        f"photos: {len(own)}, the smallest {small[1]}×{small[0]}{prior}; resolution {resolution}; each is used about "
        f"{views:.3g} times in {config.steps} steps of {config.samples}"
    )


def _check_capacity(estimate: Estimate, config: TrainConfig, tower: nn.Module, folder: Path | None) -> Iterator[Concern]:
    device = next(tower.parameters()).device
    needs = {"memory": estimate.memory - estimate.base, "disk": estimate.written}
    return checks.check_capacity(
        needs, {"memory": free_memory(device), "disk": free_bytes(folder)}, certain=device.type == "cuda"
    )


def require_disk(folder: Path, need: int) -> None:
    """Raises if the disk of a folder has less than `need` bytes free.

    Raises:
        PreflightError: with the space that the run needs, and what to do.
    """
    found = tuple(checks.check_capacity({"disk": need}, {"disk": free_bytes(folder)}, certain=False))
    Preflight((), "", None, found).check()
