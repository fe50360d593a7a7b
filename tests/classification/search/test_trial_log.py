"""The file of trials: complete lines only, reuse, and files of other searches."""

from __future__ import annotations

import json
from pathlib import Path

from tests.raising import raises
from veneer.classification.search.evolution import Trial
from veneer.classification.search.sub_network import SubNetwork
from veneer.classification.search.trial_log import TrialLog
from veneer.injection.errors import VeneerError

FIRST, SECOND = SubNetwork(((1, 0), (0, 2))), SubNetwork(((1, 1), (0, 0)))
NAMES = ("lora", "vpt")


def open_log(folder: Path, settings: str = "a", *, resume: bool = True) -> TrialLog:
    return TrialLog(folder, NAMES, settings, resume=resume)


def test_trials_are_read_again_bitwise(tmp_path: Path) -> None:
    log = open_log(tmp_path, resume=False)
    measured = [log.evaluate(FIRST, 30, lambda: (1 / 3, 0.1 + 0.2)), log.evaluate(SECOND, 40, lambda: None)]
    assert measured == [Trial(FIRST, 30, 1 / 3, 0.1 + 0.2), Trial(SECOND, 40, None, None)]
    assert log.evaluate(SECOND, 40, lambda: (0.5, 1.0)) is measured[1]
    assert list(open_log(tmp_path).trials.values()) == measured
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["sizes"] for line in lines] == [sub.as_dict(NAMES) for sub in (FIRST, SECOND)]


def test_a_loss_that_is_not_finite_is_recorded_as_diverged(tmp_path: Path) -> None:
    trial = open_log(tmp_path).evaluate(FIRST, 30, lambda: (0.4, float("nan")))
    assert (trial.val_accuracy, trial.val_loss) == (None, None)
    assert open_log(tmp_path).trials[FIRST] == trial


def test_an_incomplete_last_line_is_removed(tmp_path: Path) -> None:
    open_log(tmp_path).evaluate(FIRST, 30, lambda: (0.5, 1.0))
    whole = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(whole + whole[:25])
    log = open_log(tmp_path)
    assert [*log.trials] == [FIRST]
    log.evaluate(SECOND, 40, lambda: (0.6, 0.9))
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(whole)
    assert [*open_log(tmp_path).trials] == [FIRST, SECOND]


def test_other_searches_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    open_log(tmp_path).evaluate(FIRST, 30, lambda: (0.5, 1.0))
    with raises(VeneerError, file=str(file), where="trials", given=1, expected=0):
        open_log(tmp_path, resume=False)
    with raises(VeneerError, file=str(file), where="line 1", given="a", expected="b"):
        open_log(tmp_path, "b")
    file.write_text("{]\n")
    with raises(VeneerError, file=str(file), where="trials", given="syntax"):
        open_log(tmp_path)
    for line in ("3", '{"trial": 0}', "[]"):
        file.write_text(f"{line}\n")
        with raises(VeneerError, file=str(file), where="line 1", given=None, expected="a"):
            open_log(tmp_path)
    record: dict[str, object] = {"settings": "a", "sizes": {"lora": [1]}, "parameters": 3}
    file.write_text(f"{json.dumps(record)}\n")
    with raises(VeneerError, file=str(file), where="line 1", given=record, expected="a trial"):
        open_log(tmp_path)
