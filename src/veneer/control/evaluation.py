"""Whether control is learnt: what is drawn under the map, against the same draws without it and with another picture's map."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image

from veneer.injection import Attachment
from veneer.training.report.feature_models import features
from veneer.training.report.previews import PreviewSettings, previews

from .image_embedding import Embedder
from .map_agreement import agreement, wrong
from .maps.maps import Condition


@dataclass(frozen=True)
class Subject:
    """A held picture: its caption, itself, and its map (or itself, where pictures are followed)."""

    caption: str
    picture: Image.Image
    map: Image.Image


@dataclass(frozen=True)
class Drawings:
    """Of one subject and seed: with its map, without, and with another subject's."""

    subject: Subject
    other: Subject
    seed: int
    followed: Image.Image
    free: Image.Image
    misled: Image.Image


@dataclass(frozen=True)
class Figures:
    """Mean agreement of what was drawn with the subject's map, or picture.

    Args:
        measure: what the numbers are.
        followed, free, misled: with the map, without one, and with another's.
        over_free, over_misled: mean differences, and half their 95 % intervals (normal) over subjects, whose seeds are averaged.
        count: drawings of each kind.
    """

    measure: str
    followed: float
    free: float
    misled: float
    over_free: tuple[float, float]
    over_misled: tuple[float, float]
    count: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None for the interval of one subject."""
        found = asdict(self)
        for name in ("over_free", "over_misled"):
            found[name] = [value if math.isfinite(value) else None for value in found[name]]
        return found

    def __str__(self) -> str:
        return (
            f"{self.measure}: {self.followed:.3f} with it, {self.free:.3f} without, {self.misled:.3f} with another's "
            f"({self.over_free[0]:+.3f} ± {self.over_free[1]:.3f}, {self.over_misled[0]:+.3f} ± {self.over_misled[1]:.3f})"
        )


def draw(
    pipe: Any,
    control: Attachment,
    subjects: Sequence[Subject],
    settings: PreviewSettings,
    strength: float = 1.0,
    embedder: Embedder | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Drawings]:
    """Every subject three times for each seed, from the same noise.

    Args:
        embedder: makes what is given of a picture, where pictures are followed and not maps.
        progress: called after each batch with the number of images in it.
    """
    others = wrong(list(subjects)) if len(subjects) > 1 else list(subjects)
    kinds: list[Sequence[Subject] | None] = [subjects, None, others]
    made = [_drawn(pipe, control, subjects, given, settings, strength, embedder, progress) for given in kinds]
    places = [(subject, other, seed) for subject, other in zip(subjects, others, strict=True) for seed in settings.seeds]
    return [Drawings(*place, *three) for place, three in zip(places, zip(*made, strict=True), strict=True)]


def _drawn(
    pipe: Any, control: Attachment, subjects: Sequence[Subject], given: Sequence[Subject] | None, settings: PreviewSettings,
    strength: float, embedder: Embedder | None, progress: Callable[[int], None] | None,
) -> list[Image.Image]:  # fmt: skip
    """Pictures of all captions and seeds."""
    found = []
    for place, subject in enumerate(subjects):
        scope: contextlib.AbstractContextManager[Any] = control.enabled(False)
        if given is not None:
            scope = control.condition(**conditions(given[place].map, embedder), strength=strength, pipeline=pipe)
        size = settings.size or subject.picture.size[::-1]
        with scope:
            found += [p.image for p in previews(pipe, [subject.caption], _sized(settings, size), progress=progress)]
    return found


def _sized(settings: PreviewSettings, size: tuple[int, int]) -> PreviewSettings:
    return PreviewSettings(settings.seeds, settings.steps, settings.guidance, settings.negative, size, settings.batch)


def conditions(picture: Image.Image, embedder: Embedder | None) -> Mapping[str, Any]:
    """What is given for a map, or for a picture."""
    return {"image": picture} if embedder is None else {"embeds": embedder([picture])}


def figures(drawings: Sequence[Drawings], condition: Condition, model: str = "bundled") -> Figures:
    """The measure of a condition: agreement of maps, or likeness of pictures.

    Args:
        model: of features, where pictures are followed.
    """
    if condition.measures is None:
        measure, scores = f"likeness ({model})", _likeness(drawings, model)
    else:
        measure = f"agreement ({condition.name})"
        kinds = ("followed", "free", "misled")
        scores = [[agreement(condition, d.subject.map, getattr(d, kind)) for d in drawings] for kind in kinds]
    places: dict[int, list[int]] = {}
    for place, d in enumerate(drawings):
        places.setdefault(id(d.subject), []).append(place)
    by_subject = [[mean(kind[place] for place in own) for own in places.values()] for kind in scores]
    followed, free, misled = by_subject
    return Figures(
        measure,
        mean(followed),
        mean(free),
        mean(misled),
        _difference(followed, free),
        _difference(followed, misled),
        len(drawings),
    )


@torch.no_grad()
def _likeness(drawings: Sequence[Drawings], model: str) -> list[list[float]]:
    """Cosines of what was drawn and the subject's picture."""
    judge = features(model)
    wanted = judge.pictures([d.subject.picture for d in drawings])
    found = []
    for kind in ("followed", "free", "misled"):
        found.append((judge.pictures([getattr(d, kind) for d in drawings]) * wanted).sum(1).tolist())
    return found


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(paired), 1.96 * stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.inf
