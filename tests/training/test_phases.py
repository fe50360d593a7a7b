"""Phases of a run: JSON lines, terminal lines, and seconds."""

import io
import json
from pathlib import Path

from veneer.training.report.phases import PHASES, Phase, PhaseReport, read_phase
from veneer.training.report.progress import Progress, ProgressFile, read_progress


def test_every_line_has_phase_done_and_total(tmp_path: Path) -> None:
    path = tmp_path / "run" / "progress.jsonl"
    report = PhaseReport(path, seconds=0)
    report("loading")
    ProgressFile(path, seconds=0)(Progress(3, 9, 0.5, 0.5, 1e-3, 1.0, 2.0, 4.0, 0))
    report("evaluating", 42)(4)
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert [(line["phase"], line["done"], line["total"]) for line in lines] == [
        ("loading", 0, 0), ("training", 3, 9), ("evaluating", 0, 42), ("evaluating", 4, 42),
    ]  # fmt: skip
    assert {"loading", "training", "evaluating"} <= PHASES.keys()
    assert [event.step for event in read_progress(path)] == [3], "lines of phases are no steps"


def test_the_last_whole_line_says_where_a_run_is(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    assert read_phase(path) is None
    count = PhaseReport(path, seconds=0)("evaluating", 8)
    count(4)
    with path.open("a") as file:
        file.write('{"phase": "evalua')
    found = read_phase(path)
    assert found is not None
    assert (found.phase, found.done, found.total) == ("evaluating", 4, 8)
    path.write_text('{"step": 2, "steps": 5, "seconds_left": 1.5}\n')
    assert read_phase(path) == Phase("training", 2, 5, 1.5), "files of older versions"


def test_terminal_lines_are_rate_limited_and_the_last_is_printed() -> None:
    stream = io.StringIO()
    count = PhaseReport(None, stream, seconds=3600)("class_images", 100)
    for _ in range(25):
        count(4)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "0/100" in lines[0]
    assert "100/100" in lines[1]


def test_seconds_left_and_seconds_of_each_phase(tmp_path: Path) -> None:
    times = iter([0.0, 0.0, 0.0, 10.0, 10.0, 30.0, 30.0, 35.0])
    report = PhaseReport(tmp_path / "progress.jsonl", seconds=0, now=lambda: next(times))
    count = report("evaluating", 40)
    count(10)
    found = read_phase(tmp_path / "progress.jsonl")
    assert found is not None
    assert found.seconds_left == 30.0
    report.close()
    report("saving")
    report.close()
    assert set(report.seconds_in) == {"evaluating", "saving"}


def test_a_counter_with_absolute_progress() -> None:
    count = PhaseReport()("class_images", 384)
    count.reach(176, 384)
    assert (count.done, count.total) == (176, 384)
