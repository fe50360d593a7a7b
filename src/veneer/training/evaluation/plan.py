"""How many images a run generates at its end, in proportion to its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Evaluation = Literal["none", "quick", "full"]
KINDS: tuple[Evaluation, ...] = ("full", "quick")
"""Kinds that generate images, the larger first."""
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

    @property
    def images(self) -> int:
        """Number of images, half of them of the base model."""
        unrelated = len(self.drift_prompts) if self.seeds else 0
        return 0 if self.kind == "none" else 2 * max(1, self.seeds) * (len(self.prompts) + unrelated)


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


def affordable_plan(
    seeds: int, prompts: Sequence[str], drift_prompts: Sequence[str], training_seconds: float, image_seconds: float
) -> EvaluationPlan:
    """The largest evaluation that takes at most `SHARE` of the training time.

    Args:
        training_seconds: estimated seconds of all steps. `image_seconds`: of one image.
    """
    full, quick = (plan(kind, seeds, prompts, drift_prompts) for kind in KINDS)
    most = SHARE * training_seconds / image_seconds if image_seconds else math.inf
    if full.images <= most:
        return full
    seconds = full.images * image_seconds
    reason = f"{full.images} images would take {seconds:.0f} s, more than {SHARE:.0%} of the {training_seconds:.0f} s of training"
    return replace(quick if quick.images <= most else plan("none", 0, (), ()), reason=reason)
