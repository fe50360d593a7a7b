"""The verdict of a run with several concepts: that of each concept, and the worst of them for the run.

The rule of a concept is that of `personal_verdict`. A concept whose images are more similar to the photos of another one (the
whole interval of the margin is below 0) is `not_learned`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..report.personalization_verdict import personal_verdict
from ..report.verdict import WORDS, Outcome, Verdict
from .evaluation import ConceptScores

if TYPE_CHECKING:
    from ..personalization_config import PersonalizeConfig

WORST_FIRST: tuple[Outcome, ...] = ("not_learned", "overfitted", "unknown", "partly", "learned")


def concept_verdict(scores: ConceptScores, config: PersonalizeConfig) -> Verdict:
    """The verdict of one concept.

    Args:
        config: completed, for the advice.
    """
    concept = scores.concept
    config = dataclasses.replace(config, concept=concept.token, class_word=concept.class_word)
    verdict = personal_verdict(scores.metrics, config)
    reasons = [_confusion(token, each.margin.mean) for token, each in scores.confusion.items()]
    confused = [token for token, each in scores.confusion.items() if each.is_confused]
    if confused:
        summary = f"Images are more similar to the photos of {' and '.join(confused)} than to its own."
        advice = (f"train more on its photos: repeats in the dataset of {concept.token}", *verdict.advice)
        return Verdict("not_learned", summary, (*verdict.reasons, *reasons), advice)
    return dataclasses.replace(verdict, reasons=(*verdict.reasons, *reasons))


def run_verdict(verdicts: Mapping[str, Verdict]) -> Verdict:
    """The verdict of a run: the worst outcome, and each concept by name.

    Args:
        verdicts: token to the verdict of its concept, at least one.
    """
    outcome = min((verdict.outcome for verdict in verdicts.values()), key=WORST_FIRST.index)
    summary = " ".join(f"{token}: {WORDS[verdict.outcome]}. {verdict.summary}" for token, verdict in verdicts.items())
    reasons = _named(verdicts, [verdict.reasons for verdict in verdicts.values()])
    advice = tuple(dict.fromkeys(step for verdict in verdicts.values() for step in verdict.advice))
    return Verdict(outcome, summary, reasons, advice)


def _named(verdicts: Mapping[str, Verdict], texts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(f"{token}: {text}" for token, own in zip(verdicts, texts, strict=True) for text in own)


def _confusion(token: str, margin: float) -> str:
    direction = "more" if margin >= 0 else "less"
    return f"Images are {abs(margin):.2f} {direction} similar to its own photos than to those of {token}."
