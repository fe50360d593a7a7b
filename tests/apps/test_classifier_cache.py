"""Which classifiers stay loaded between questions; none is loaded here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from veneer.apps import classifier_cache as module
from veneer.apps.classifier_cache import MAX_CLASSIFIERS, ClassifierCache

from tests.raising import raises
from veneer.injection.errors import StateError


def test_least_recently_used_classifiers_are_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def opens(run: Path) -> object:
        opened.append(run.name)
        return object()

    monkeypatch.setattr(module, "open_predictor", opens)
    runs = [tmp_path / str(number) for number in range(MAX_CLASSIFIERS + 1)]
    for run in runs:
        run.mkdir()
        (run / "model.json").touch()
    answers = ClassifierCache()
    first = answers._predictor(runs[0])
    for run in runs[1:MAX_CLASSIFIERS]:
        answers._predictor(run)
    assert answers._predictor(runs[0]) is first
    answers._predictor(runs[MAX_CLASSIFIERS])
    assert answers._predictor(runs[0]) is first, "it was asked later than others"
    assert opened == [run.name for run in runs]
    os.utime(runs[0] / "model.json", (1, 1))
    assert answers._predictor(runs[0]) is not first, "it has been trained further"
    assert len(answers._predictors) == MAX_CLASSIFIERS
    with raises(StateError, where=tmp_path.name, given="untrained"):
        answers._predictor(tmp_path)
