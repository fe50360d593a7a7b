"""How many images a run generates at its end, in proportion to its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Evaluation = Literal["none", "quick", "full"]
SHARE = 0.25
"""Largest time of the evaluation, as a share of the training time, that is chosen by default."""
QUICK_PROMPTS = 2
"""Prompts with the concept, and as many without it, of a quick evaluation, with one image each."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated.

    Args:
        kind: `none` generates nothing.
        seeds: images per prompt. 0 with prompts: an image grid with one image each, without metrics.
        prompts, drift_prompts: prompts with the concept and without it.
        reason: why less than the full evaluation was chosen; empty if it was not, or was requested.
    """

    kind: Evaluation
    seeds: int
    prompts: tuple[str, ...]
    drift_prompts: tuple[str, ...]
    reason: str = ""

    def images(self, concepts: int = 1) -> int:
        """Number of images, half of them of the base model.

        Args:
            concepts: number of trained concepts, each with all prompts.
        """
        unrelated = len(self.drift_prompts) if self.seeds else 0
        return 0 if self.kind == "none" else 2 * max(1, self.seeds) * (concepts * len(self.prompts) + unrelated)


def plan(kind: Evaluation, seeds: int, prompts: Sequence[str], drift_prompts: Sequence[str]) -> EvaluationPlan:
    """The evaluation of a kind.

    Args:
        seeds: images per prompt of the full evaluation. `prompts`, `drift_prompts`: its prompts.
    """
    if kind == "none":
        return EvaluationPlan(kind, 0, (), ())
    if kind == "quick":
        return EvaluationPlan(kind, min(seeds, 1), tuple(prompts[:QUICK_PROMPTS]), tuple(drift_prompts[:QUICK_PROMPTS]))
    return EvaluationPlan(kind, seeds, tuple(prompts), tuple(drift_prompts))


def affordable_plan(full: EvaluationPlan, training_seconds: float, image_seconds: float, concepts: int = 1) -> EvaluationPlan:
    """The largest part of a full evaluation that takes at most `SHARE` of the training time.

    Args:
        training_seconds: estimated seconds of all steps. `image_seconds`: of one image. `concepts`: number of trained concepts.
    """
    most, count = SHARE * training_seconds / image_seconds if image_seconds else math.inf, full.images(concepts)
    if count <= most:
        return full
    quick = plan("quick", full.seeds, full.prompts, full.drift_prompts)
    reason = (
        f"{count} images would take {count * image_seconds:.0f} s, more than {SHARE:.0%} of the {training_seconds:.0f} s of "
        "training"
    )
    return replace(quick if quick.images(concepts) <= most else plan("none", 0, (), ()), reason=reason)
