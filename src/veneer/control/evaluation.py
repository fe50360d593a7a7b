"""Evaluation of control: images generated with the map, without it, and with the map of another image, from the same noise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image

from veneer.injection import Attachment
from veneer.training.report.feature_models import features
from veneer.training.report.previews import PreviewSettings, previews

from .image_embedding import Embedder
from .map_agreement import agreement, mismatched
from .maps.maps import Condition


@dataclass(frozen=True)
class Subject:
    """A held-out image with its caption and map (or the image again, for image embeddings)."""

    caption: str
    image: Image.Image
    map: Image.Image


@dataclass(frozen=True)
class ControlSamples:
    """Images of one subject and seed: with its map, without a map, and with another subject's map."""

    subject: Subject
    other: Subject
    seed: int
    followed: Image.Image
    free: Image.Image
    misled: Image.Image


@dataclass(frozen=True)
class ControlMetrics:
    """Mean agreement of the generated images with the subject's map or image.

    Args:
        measure: name of the metric.
        followed, free, misled: with the map, without a map, and with another subject's map.
        over_free, over_misled: mean differences and half their 95 % intervals (normal) over subjects, whose seeds are averaged.
        count: number of images of each kind.
    """

    measure: str
    followed: float
    free: float
    misled: float
    over_free: tuple[float, float]
    over_misled: tuple[float, float]
    count: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values; the infinite interval of a single subject becomes None."""
        found = asdict(self)
        for name in ("over_free", "over_misled"):
            found[name] = [value if math.isfinite(value) else None for value in found[name]]
        return found

    def __str__(self) -> str:
        return (
            f"{self.measure}: {self.followed:.3f} with the condition, {self.free:.3f} without, {self.misled:.3f} with another "
            f"image's ({self.over_free[0]:+.3f} ± {self.over_free[1]:.3f}, {self.over_misled[0]:+.3f} ± "
            f"{self.over_misled[1]:.3f})"
        )


def generate_samples(
    pipe: Any,
    control: Attachment,
    subjects: Sequence[Subject],
    settings: PreviewSettings,
    strength: float = 1.0,
    embedder: Embedder | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[ControlSamples]:
    """Generates three images per subject and seed from the same noise: with its map, without, and with another subject's.

    Args:
        embedder: image encoder of methods that use image embeddings instead of maps.
        progress: called after each batch with the number of images in it.
    """
    others = mismatched(list(subjects)) if len(subjects) > 1 else list(subjects)
    kinds: list[Sequence[Subject] | None] = [subjects, None, others]
    made = [_generate(pipe, control, subjects, given, settings, strength, embedder, progress) for given in kinds]
    places = [(subject, other, seed) for subject, other in zip(subjects, others, strict=True) for seed in settings.seeds]
    return [ControlSamples(*place, *three) for place, three in zip(places, zip(*made, strict=True), strict=True)]


def _generate(
    pipe: Any, control: Attachment, subjects: Sequence[Subject], given: Sequence[Subject] | None, settings: PreviewSettings,
    strength: float, embedder: Embedder | None, progress: Callable[[int], None] | None,
) -> list[Image.Image]:  # fmt: skip
    """Generates images for all captions and seeds under one kind of condition."""
    found = []
    for place, subject in enumerate(subjects):
        scope: contextlib.AbstractContextManager[Any] = control.enabled(False)
        if given is not None:
            scope = control.condition(**conditions(given[place].map, embedder), strength=strength, pipeline=pipe)
        size = settings.size or subject.image.size[::-1]
        with scope:
            found += [p.image for p in previews(pipe, [subject.caption], _sized(settings, size), progress=progress)]
    return found


def _sized(settings: PreviewSettings, size: tuple[int, int]) -> PreviewSettings:
    return replace(settings, size=size)


def conditions(image: Image.Image, embedder: Embedder | None) -> Mapping[str, Any]:
    """Condition inputs of a map, or of an image by its embedding."""
    return {"image": image} if embedder is None else {"embeds": embedder([image])}


def measure_samples(samples: Sequence[ControlSamples], condition: Condition, model: str = "bundled") -> ControlMetrics:
    """Computes the metric of a condition: agreement of maps, or similarity of images.

    Args:
        model: feature model for the similarity of images.
    """
    if condition.measures is None:
        measure, scores = f"similarity ({model})", _similarity(samples, model)
    else:
        measure = f"agreement ({condition.name})"
        kinds = ("followed", "free", "misled")
        scores = [[agreement(condition, d.subject.map, getattr(d, kind)) for d in samples] for kind in kinds]
    places: dict[int, list[int]] = {}
    for place, d in enumerate(samples):
        places.setdefault(id(d.subject), []).append(place)
    by_subject = [[mean(kind[place] for place in own) for own in places.values()] for kind in scores]
    followed, free, misled = by_subject
    return ControlMetrics(
        measure,
        mean(followed),
        mean(free),
        mean(misled),
        _difference(followed, free),
        _difference(followed, misled),
        len(samples),
    )


@torch.no_grad()
def _similarity(samples: Sequence[ControlSamples], model: str) -> list[list[float]]:
    """Cosine similarity of the generated images to the subject's image."""
    feature_model = features(model)
    targets = feature_model.images([d.subject.image for d in samples])
    found = []
    for kind in ("followed", "free", "misled"):
        found.append((feature_model.images([getattr(d, kind) for d in samples]) * targets).sum(1).tolist())
    return found


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(paired), 1.96 * stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.inf
