"""The verdict of a run with several tasks."""

from __future__ import annotations

from veneer.classification.tasks.results import worst_verdict
from veneer.training.report.verdict import Verdict

LEARNED = Verdict("learned", "It tells the classes apart.", ("Test accuracy is 90%.",))
PARTLY = Verdict("partly", "It tells some classes apart.", ("Test accuracy is 30%.",))


def test_the_worst_task_is_named() -> None:
    verdict = worst_verdict({"pets": LEARNED, "clothes": PARTLY})
    assert verdict.outcome == "partly"
    assert verdict.summary == f"clothes: {PARTLY.summary}"
    assert verdict.reasons == (f"pets: {LEARNED.reasons[0]}", f"clothes: {PARTLY.reasons[0]}")


def test_no_task_is_named_if_their_outcomes_are_equal() -> None:
    assert worst_verdict({"pets": LEARNED, "clothes": LEARNED}).summary == LEARNED.summary
