"""Progress events, terminal lines, and the remaining time."""

import contextlib
import io
import os
import pty
import sys
from pathlib import Path

import psutil
import pytest
import torch

from veneer.training.report.bars import close_bar
from veneer.training.report.phases import PhaseReport
from veneer.training.report.progress import WINDOW, Pace, Progress, ProgressFile, ProgressLine, clock, peak_memory, read_progress


def event(step, steps=100, left=75.0):
    return Progress(step, steps, 0.5, 0.25, 1e-4, 1.0, 10.0, left, 3 * 2**29)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_event_as_a_line():
    assert str(event(7)) == "step 7/100  loss 0.2500  lr 1.00e-04  1:15 left  1.5 GiB"
    assert "left" not in str(event(1, left=None))


def test_time_left_is_the_mean_of_the_last_steps():
    """A hundred slow first steps have no effect after `WINDOW` fast ones."""
    times = iter([*(10.0 * i for i in range(100)), *(990.0 + 0.5 * i for i in range(1, WINDOW + 1))])
    pace = Pace(lambda: next(times))
    assert pace.left(99) is None
    assert pace.left(98) == pytest.approx(980)
    for _ in range(98):
        pace.left(0)
    for _ in range(WINDOW - 1):
        pace.left(0)
    assert pace.left(20) == pytest.approx(10.0)


def test_log_shows_first_and_last_and_few_between():
    stream = io.StringIO()
    line = ProgressLine(stream, seconds=3600)
    for step in range(1, 101):
        line(event(step))
    assert [text.split()[1] for text in stream.getvalue().splitlines()] == ["1/100", "100/100"]


def test_a_terminal_has_a_bar_on_one_line():
    stream = Terminal()
    line = ProgressLine(stream)
    line.seconds = 0
    for step in (1, 2, 100):
        line(event(step))
    *_, last = stream.getvalue().split("\r")
    assert last.startswith("training 100%|")
    assert "100/100 steps" in last
    assert event(100).note() in last
    assert last.endswith("\n")
    assert stream.getvalue().count("\n") == 1


def test_a_bar_that_is_closed_early_ends_its_line():
    stream = Terminal()
    ProgressLine(stream)(event(3))
    assert "\n" not in stream.getvalue()
    close_bar()
    assert stream.getvalue().endswith("\n")


def test_another_phase_closes_the_bar_of_training():
    stream = Terminal()
    line, report = ProgressLine(stream), PhaseReport(None, stream)
    line.seconds = 0
    line(event(3))
    count = report("previews", 2)
    count(2)
    report("saving")
    line(event(4))
    close_bar()
    lines = [text.split("\r")[-1] for text in stream.getvalue().split("\n")]
    assert [text.partition("|")[0].split("%")[0].rsplit(None, 1)[0] for text in lines if "%" in text] == [
        "training", "generating previews", "training"
    ]  # fmt: skip
    assert sum("saving" in text for text in lines) == 1


def test_peak_memory_of_this_process():
    before = peak_memory(torch.device("cpu"))
    process, keep = psutil.Process(), []
    while process.memory_info().rss < before + 100 * 2**20:  # unused pages may leave the memory meanwhile
        keep.append(torch.ones(5 * 2**20))
    assert peak_memory(torch.device("cpu")) >= before + 50 * 2**20


def test_a_file_that_is_read_while_it_is_written(tmp_path: Path) -> None:
    """Steps repeated after a resume replace earlier events, and a line cut by a kill is ignored."""
    path = tmp_path / "run" / "progress.jsonl"
    assert read_progress(path) == []
    tell = ProgressFile(path, seconds=0)
    for step in (1, 2, 3):
        tell(event(step))
    with path.open("a") as file:
        file.write('{"step": 4, "st')
    again = ProgressFile(path, seconds=0)
    again(event(3, left=None))
    assert read_progress(path) == [event(1), event(2), event(3, left=None)]


def test_the_file_is_not_written_at_every_step(tmp_path: Path) -> None:
    tell = ProgressFile(tmp_path / "progress.jsonl", seconds=1000)
    for step in (1, 2, 3, 100):
        tell(event(step))
    assert [e.step for e in read_progress(tmp_path / "progress.jsonl")] == [1, 100], "the first and the last are"


def test_a_terminal_without_a_size_has_a_bar():
    """As under `expect` or a continuous integration with a pseudo-terminal."""
    code = (
        "import sys\nfrom veneer.training.report.bars import show_bar\n"
        "for step in (1, 2): show_bar(sys.stderr, 'training', step, 2, 'steps', 'loss 0.1')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    output = b""
    with contextlib.suppress(OSError):  # the process has ended
        while part := os.read(terminal, 4096):
            output += part
    assert os.waitpid(pid, 0)[1] == 0
    assert b"training 100%" in output
