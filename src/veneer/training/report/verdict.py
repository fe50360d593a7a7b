"""The verdict of a run: one word, one sentence, the scores behind it, and what to change.

Each command has its own rule, a pure function of its metrics: `personal_verdict`, `control.verdict` and
`classification.report.verdict`.
All rules read 95 % intervals: a score counts as better or worse only if the whole interval of the difference says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from veneer.injection.errors import OptionError

Outcome = Literal["learned", "partly", "not_learned", "overfitted", "unknown"]

WORDS: dict[Outcome, str] = {
    "learned": "learned",
    "partly": "partly learned",
    "not_learned": "not learned",
    "overfitted": "overfitted",
    "unknown": "unknown",
}
"""Outcome to its label."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a run with reasons and advice.

    Args:
        outcome: `learned`, `partly`, `not_learned`, `overfitted` (the subject was learned and the rest was damaged) or `unknown`
            (not evaluated, or too few images).
        summary: one plain sentence.
        reasons: sentences with the scores that the outcome follows from.
        advice: next steps, with the flags of the command that trained.

    Raises:
        VeneerError: an unknown outcome.

    >>> Verdict("partly", "Similarity rose a little.", ("0.2 with the adapter, 0.1 without.",)).as_dict()["outcome"]
    'partly'
    """

    outcome: Outcome
    summary: str
    reasons: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            allowed = get_args(Outcome)
            message = f"verdict: outcome is {self.outcome!r}; expected one of {', '.join(allowed)}."
            raise OptionError(message, option="outcome", given=self.outcome, expected=allowed)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `result.json` has them under `verdict`."""
        found = asdict(self)
        return {**found, "reasons": list(self.reasons), "advice": list(self.advice)}

    def text(self) -> str:
        """Lines for a terminal."""
        lines = [f"verdict: {WORDS[self.outcome]}. {self.summary}"]
        lines += [f"  {reason}" for reason in self.reasons]
        return "\n".join([*lines, *(f"  next: {step}" for step in self.advice)])


def read_verdict(record: Mapping[str, Any]) -> Verdict:
    """The verdict of a `result.json`; `unknown` for a file of an older version."""
    found = record.get("verdict")
    if not found:
        return Verdict("unknown", "This run has no verdict.")
    return Verdict(found["outcome"], found["summary"], tuple(found["reasons"]), tuple(found["advice"]))
