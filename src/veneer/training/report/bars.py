"""A progress bar on a terminal, by tqdm. At most one is open: a new one, or `close_bar`, ends the line of the last."""

from __future__ import annotations

import shutil
from typing import Any, TextIO

_bars: list[Any] = []


def show_bar(stream: TextIO, label: str, done: int, total: int, unit: str = "images", note: str = "") -> None:
    """Shows how much of a phase is done; closes the bar when all is.

    Args:
        label: name of the phase. `unit`: of `done` and `total`. `note`: such as the loss, after the time.
    """
    bar = _bars[0] if _bars and (_bars[0].desc, _bars[0].total) == (label, total) else _new(stream, label, done, total, unit)
    bar.set_postfix_str(note, refresh=False)
    bar.update(done - bar.n)
    if done >= total:
        close_bar()


def close_bar() -> None:
    """Closes the open bar, if there is one, so that the next output begins on a new line."""
    while _bars:
        _bars.pop().close()


def _new(stream: TextIO, label: str, done: int, total: int, unit: str) -> Any:
    from tqdm import tqdm

    close_bar()
    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
    size = shutil.get_terminal_size()  # of 0 x 0, which some pseudo-terminals have, tqdm makes empty lines
    place = {"ncols": max(40, size.columns - 1), "nrows": max(2, size.lines)}
    bar = tqdm(desc=label, total=total, initial=done, unit=unit, file=stream, bar_format=form, mininterval=0.1, **place)
    bar.desc = label  # tqdm appends ": "
    _bars.append(bar)
    return bar
