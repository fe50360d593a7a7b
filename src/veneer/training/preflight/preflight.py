"""What a run will do, said before it starts: what is trained, what it costs, and what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from veneer.injection.errors import VeneerError

from ..data.photo_folder import Photo
from ..loop.config import TrainConfig
from ..loop.disk_space import free_bytes
from . import checks as look
from .checks import Concern
from .estimates import Estimate, estimate

if TYPE_CHECKING:
    from veneer.injection.attachment.attachment import Attachment
    from veneer.injection.attachment.report import Report

    from ..families import Family
    from ..loop.optimizers import Group
    from ..report.previews import PreviewSettings

__all__ = ["Concern", "Estimate", "Preflight", "PreflightError", "preflight"]


class PreflightError(VeneerError):
    """A run that cannot work; the message lists every reason, and `given` has them as `Concern`."""


@dataclass(frozen=True)
class Preflight:
    """What `preflight` found.

    Args:
        reports: coverage of each attachment: sites per block, what is trained.
        photos: a line on the pictures. `estimate`: the cost, or None where something forbids even a trial step.
        concerns: errors first, then warnings, then notes.
    """

    reports: tuple[Report, ...]
    photos: str
    estimate: Estimate | None
    concerns: tuple[Concern, ...]

    @property
    def errors(self) -> tuple[Concern, ...]:
        """What cannot work."""
        return tuple(c for c in self.concerns if c.severity == "error")

    @property
    def warnings(self) -> tuple[Concern, ...]:
        """What probably is a mistake."""
        return tuple(c for c in self.concerns if c.severity == "warning")

    def text(self) -> str:
        """Everything, as lines for a terminal."""
        cost = "cost: unknown, for the errors below" if self.estimate is None else f"cost: {self.estimate}"
        return "\n".join(["trained:", *map(str, self.reports), self.photos, cost, *map(str, self.concerns)])

    def check(self) -> None:
        """Raise if something cannot work.

        Raises:
            PreflightError: with every error, and what to do.
        """
        if self.errors:
            raise PreflightError(
                "this run cannot work:\n" + "\n".join(f"- {c.about}: {c.message}" for c in self.errors), given=self.errors
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
    groups: Sequence[Group] | None = None,
    usual_rates: Mapping[str, float] | None = None,
    processes: int = 1,
    folder: Path | None = None,
    measure: bool = True,
    images: int = 0,
    previews: int = 0,
    sampling: PreviewSettings | None = None,
    loading: float = 0.0,
) -> Preflight:
    """Look at a run before it starts. Weights, gradients and the random state are as before afterwards.

    Args:
        attachments: what is trained, attached to the family's pipeline.
        config: the loop's settings. `photos`: from `find_photos`, class pictures too. `concept`: the new word, or the class.
        resolution: side of the pictures in pixels; None for the base's own.
        prompts: what will be encoded besides the captions, such as filled templates and the prompts of previews.
        groups: as given to the trainer, for their own learning rates. `usual_rates`: method name to the one usual on this base.
        processes: how many share a batch. `folder`: where checkpoints go, to see if the disk has room.
        measure: run two real passes of a micro-batch; False counts from shapes and the speed of a matrix product instead.
        images, previews: generated for the evaluation and for previews, for the estimates of time and disk. `sampling`: how.
        loading: seconds that the run has taken so far.
    """
    side = resolution or family.resolution
    texts = [*_captions(photos, concept), *(prompts or ())]
    found = [
        *look.sites(attachments),
        *look.learning_rates(attachments, config, groups, usual_rates),
        *look.steps(config, photos),
        *look.pictures(photos, side, concept),
        *look.side(side, family),
        *look.concept_word(attachments, family, concept, photos),
        *look.prompts(family, texts),
    ]
    cost = None
    if not any(concern.severity == "error" for concern in found):
        pairs = 2 if any(photo.is_prior for photo in photos) else 1
        rows = math.ceil(config.batch / processes) * pairs
        try:
            samples = math.ceil(config.samples / processes) * pairs
            cost = estimate(
                attachments, config, family, side, rows, samples, texts, measure, images=images, previews=previews,
                sampling=sampling, loading=loading,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            found.append(Concern("memory", f"a trial step does not fit: {str(error).splitlines()[0]}", "error"))
        else:
            found += _room(cost, config, family.tower, folder)
    order = ("error", "warning", "note")
    return Preflight(
        tuple(a.report() for a in attachments),
        _pictures(photos, side, config),
        cost,
        tuple(sorted(found, key=lambda concern: order.index(concern.severity))),
    )


def _captions(photos: Sequence[Photo], concept: str) -> list[str]:
    """The written captions and the bare concept."""
    return [concept, *(p.caption.replace("{concept}", concept) for p in photos if p.caption)]


def _pictures(photos: Sequence[Photo], resolution: int, config: TrainConfig) -> str:
    own = [photo for photo in photos if not photo.is_prior]
    if not own:
        return "photos: none"
    small = min(own, key=lambda photo: min(photo.size)).size
    prior = f", {len(photos) - len(own)} class pictures" if len(own) < len(photos) else ""
    views = config.steps * config.samples / len(own)
    return (
        f"photos: {len(own)}, the smallest {small[1]}×{small[0]}{prior}; trained at {resolution} pixels, each seen about "
        f"{views:.3g} times in {config.steps} steps of {config.samples}"
    )


def _room(estimate: Estimate, config: TrainConfig, tower: nn.Module, folder: Path | None) -> Iterator[Concern]:
    device = next(tower.parameters()).device
    needs = {"memory": estimate.memory - estimate.base, "disk": estimate.written}
    return look.room(needs, {"memory": _free(device), "disk": free_bytes(folder)}, certain=device.type == "cuda")


def require_disk(folder: Path, need: int) -> None:
    """Raise if the disk of a folder has not so many bytes free.

    Raises:
        PreflightError: how much the run needs, and what to do.
    """
    found = tuple(look.room({"disk": need}, {"disk": free_bytes(folder)}, certain=False))
    Preflight((), "", None, found).check()


def _free(device: torch.device) -> int | None:
    """Bytes that the device can still give, beyond the weights that are loaded; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "cpu":
        import psutil  # accelerate brings it

        return int(psutil.virtual_memory().available)
    return None
