"""Metrics of each concept of a run, and how far its images resemble the photos of the other concepts.

For an image of one concept, with P the photos of its concept and Q those of another one:

- **similarity to Q**   mean over q in Q of ⟨f(g), f(q)⟩, of the adapted and of the base pipeline
- **margin**            similarity to P minus similarity to Q, of the adapted pipeline, with a 95 % interval over images: below 0,
                        the concepts are confused
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from ..report.feature_models import Features
from ..report.metrics import MeanInterval, Metrics, PairedMetric, compare_paired, mean_interval, mean_similarity, measure
from ..report.previews import PreviewPair
from .concept import Concept


@dataclass(frozen=True)
class Confusion:
    """Similarity of a concept's images to the photos of another concept.

    Args:
        similarity: to the other concept's photos. `margin`: similarity to its own photos minus that, of the adapted pipeline.
    """

    similarity: PairedMetric
    margin: MeanInterval

    @property
    def is_confused(self) -> bool:
        """Whether images are more similar to the photos of the other concept: the whole interval of the margin is below 0."""
        return self.margin.high is not None and self.margin.high < 0


@dataclass(frozen=True)
class ConceptScores:
    """Scores of one concept.

    Args:
        concept: its token and class word. `photos`: number of its photos.
        metrics: see `Metrics`. `confusion`: token of another concept to the similarity to its photos.
    """

    concept: Concept
    photos: int
    metrics: Metrics
    confusion: Mapping[str, Confusion]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        confusion = {token: asdict(each) for token, each in self.confusion.items()}
        return {**asdict(self.concept), "photos": self.photos, "metrics": self.metrics.as_dict(), "confusion": confusion}

    def __str__(self) -> str:
        lines = [f"{self.concept.token}:", str(self.metrics)]
        for token, each in self.confusion.items():
            lines.append(f"similarity to photos of {token}: {each.similarity.adapted}; its own minus these: {each.margin}")
        return "\n".join(lines)


def measure_concepts(
    features: Features,
    photos: Mapping[Concept, Sequence[Image.Image]],
    pairs: Mapping[Concept, Sequence[PreviewPair]],
    unrelated: Sequence[PreviewPair],
) -> list[ConceptScores]:
    """Scores of every concept.

    Args:
        photos: training photos of each concept. `pairs`: images of its prompts.
        unrelated: images of prompts without a concept.
    """
    words = {concept.token: concept.class_word for concept in photos if concept.class_word}
    real = {concept: features.images(images) for concept, images in photos.items()}
    scores = []
    for concept, made in pairs.items():
        adapted, base = (features.images([getattr(pair, side) for pair in made]) for side in ("adapted", "base"))
        own = mean_similarity(adapted, real[concept])
        confusion = {
            other.token: Confusion(
                compare_paired(mean_similarity(adapted, theirs), mean_similarity(base, theirs)),
                mean_interval(own - mean_similarity(adapted, theirs)),
            )
            for other, theirs in real.items()
            if other != concept
        }
        metrics = measure(features, photos[concept], made, unrelated, words)
        scores.append(ConceptScores(concept, len(photos[concept]), metrics, confusion))
    return scores
