"""Output of commands: `--quiet` for errors only, `--json` for one JSON object on stdout."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

RESULT = "result.json"
"""Name of the file with the results in the folder of a run."""
ATTRIBUTES = ("where", "given", "expected", "file", "option")
"""Attributes of errors that JSON output includes."""


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--quiet`, and `--json` unless the command has its own."""
    group = parser.add_argument_group("messages")
    group.add_argument(
        "--quiet", dest="quiet output", action="store_true", help="print only errors, and the JSON object of --json"
    )
    if "--json" not in parser._option_string_actions:
        text = "print the result, or the error, as one JSON object on stdout, and messages on stderr"
        group.add_argument("--json", dest="json output", action="store_true", help=text)


class _Copy(io.TextIOBase):
    """A stream that writes to another one and keeps the text."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text = stream, ""

    def write(self, text: str) -> int:
        self.text += text
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def output(quiet: bool, as_json: bool) -> Iterator[Callable[[], list[str]]]:
    """Context in which stdout goes to stderr with `as_json`, and both are discarded with `quiet`.

    Yields:
        A function that returns the lines written to stdout with `as_json`.
    """
    with contextlib.ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        copy = _Copy(sys.stderr)
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(copy))
        yield lambda: copy.text.splitlines()


def result_of(value: Any, printed: Sequence[str] = ()) -> dict[str, Any]:
    """The result of a command as JSON values.

    Args:
        value: the folder of a run, whose `result.json` is included; lines, of which those that are paths become `files`; a
            mapping; or None or `Path()` for no result.
        printed: what the command printed, for one without a result, such as `--check`, `--dry-run` or `--print-config`.
    """
    if value is None or value == Path() or (isinstance(value, Path) and not value.exists()):
        return {"messages": list(printed)}
    if isinstance(value, Path):
        file = value / RESULT
        return {"folder": str(value), **({"result": json.loads(file.read_text("utf-8"))} if file.is_file() else {})}
    if isinstance(value, Mapping):
        return dict(value)
    lines = [str(line) for line in value]
    files = [line for line in lines if _is_file(line)]
    return {"files": files, "messages": [line for line in lines if line not in files]}


def error_of(error: Exception, message: str) -> dict[str, Any]:
    """An error as JSON values: class, message and attributes such as `where`, `given`, `expected`."""
    attributes = {name: getattr(error, name) for name in ATTRIBUTES if getattr(error, name, None) is not None}
    return {"error": {"type": type(error).__name__, "message": message, **attributes}}


def print_json(command: str, content: Mapping[str, Any]) -> None:
    """Prints one line of JSON; NaN becomes null, and other values that JSON lacks become text."""
    print(json.dumps(_finite({"command": command, **content}), ensure_ascii=False, default=_plain, allow_nan=False))


def print_lines(lines: Iterable[Any]) -> list[str]:
    """Prints each line at once, and returns them."""
    printed = []
    for line in lines:
        print(line)
        printed.append(str(line))
    return printed


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (set, frozenset)) else str(value)


def _is_file(line: str) -> bool:
    return "\n" not in line and len(line) < 4096 and Path(line).exists()
