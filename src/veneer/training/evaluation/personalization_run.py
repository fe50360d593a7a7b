"""A personalization run: what its previews, evaluation and files are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer import base_models
from veneer.injection.attachment.attachment import Attachment

from ..concepts.concept import Concept
from ..data.photo_folder import Photo
from ..fixed_adapters import FixedAdapter
from ..report.phases import PhaseReport
from ..report.previews import PreviewSettings
from ..training_options import sampling_options
from .plan import EvaluationPlan, plan

if TYPE_CHECKING:
    from ..loop.sharded_base import ShardedBase
    from ..personalization_config import PersonalizeConfig

GRID_PROMPTS = 4
"""Number of prompts on the image grid; the metrics use all."""


@dataclass(frozen=True)
class PersonalizationRun:
    """A personalization run: configuration, pipeline, adapters, photos, folder, phase report, warnings, and the base model if it
    is sharded.

    Args:
        subjects: photos of each concept, if there are several.
        extra: further entries of `result.json`.
        fixed: adapters on top of which the run trains.
        chosen: evaluation that was chosen for the time of the training, instead of that of the config.
    """

    config: PersonalizeConfig
    pipe: Any
    attached: Sequence[Attachment]
    photos: Sequence[Photo]
    out: Path
    report: PhaseReport = field(default_factory=PhaseReport)
    notes: list[str] = field(default_factory=list)
    base: ShardedBase | None = None
    subjects: Mapping[Concept, Sequence[Photo]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    chosen: EvaluationPlan | None = None
    fixed: Sequence[FixedAdapter] = ()

    def settings(self, seeds: int) -> PreviewSettings:
        """Sampling settings of the run, by default those of the base model's preset."""
        preset = base_models.preset(self.config.base)
        settings = PreviewSettings(tuple(range(seeds)), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=4)
        return sampling_options(settings, self.config)

    @property
    def evaluation(self) -> EvaluationPlan:
        """What is evaluated at the end of the run."""
        config = self.config
        kind = "full" if config.eval is None or config.eval == "auto" else config.eval
        return self.chosen or plan(kind, config.eval_seeds or 0, config.prompts or ("{concept}",), config.drift_prompts or ())

    def evaluation_prompts(self, concept: Concept) -> list[str]:
        """Prompts with a concept that are evaluated."""
        return [prompt.replace("{concept}", concept.token) for prompt in self.evaluation.prompts]

    def previews(self, steps: int) -> int:
        """Number of preview images in a run of `steps` steps."""
        every = self.config.preview_every
        return steps // every * len(self.grid_prompts) if every else 0

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The trained concepts."""
        return tuple(self.subjects) or (Concept(self.config.concept, self.config.class_word),)

    def photos_of(self, concept: Concept) -> Sequence[Photo]:
        """The photos of a concept."""
        return self.subjects.get(concept, self.photos)

    def prompts_of(self, concept: Concept) -> list[str]:
        """Evaluation prompts, with the concept inserted."""
        return [p.replace("{concept}", concept.token) for p in self.config.prompts or ("{concept}",)]

    @property
    def prompts(self) -> list[str]:
        """Evaluation prompts of all concepts."""
        return [prompt for concept in self.concepts for prompt in self.prompts_of(concept)]

    @property
    def grid_prompts(self) -> list[str]:
        """The prompts on the image grid and on previews: the first ones of each concept."""
        count = max(1, GRID_PROMPTS // len(self.concepts))
        return [prompt for concept in self.concepts for prompt in self.prompts_of(concept)[:count]]

    @property
    def base_words(self) -> dict[str, str]:
        """Replacement of the concepts in prompts for the base model and text encoders, which do not know them."""
        return {concept.token: concept.class_word for concept in self.concepts if concept.class_word}
