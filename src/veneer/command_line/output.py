"""Output of commands: `--quiet` for errors only, `--json` for one JSON object on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULT = "result.json"
"""Name of the file with the results in the folder of a run."""
ATTRIBUTES = ("where", "given", "expected", "file", "option")
"""Attributes of errors that JSON output includes."""


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--quiet`, and `--json` unless the command has its own."""
    group = parser.add_argument_group("messages")
    group.add_argument("--quiet", dest="quiet output", action="store_true", help="print errors only")
    if "--json" not in parser._option_string_actions:
        text = "print the result, or the error, as one JSON object on stdout, and everything else on stderr"
        group.add_argument("--json", dest="json output", action="store_true", help=text)


@contextlib.contextmanager
def output(quiet: bool, as_json: bool) -> Iterator[None]:
    """Context in which stdout goes to stderr with `as_json`, and both are discarded with `quiet`."""
    with contextlib.ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        elif as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def result_of(value: Any) -> dict[str, Any]:
    """The result of a command as JSON values.

    Args:
        value: the folder of a run, whose `result.json` is included; lines, of which those that are paths become `files`; or a
            mapping.
    """
    if isinstance(value, Path):
        file = value / RESULT
        return {"folder": str(value), **({"result": json.loads(file.read_text("utf-8"))} if file.is_file() else {})}
    if isinstance(value, Mapping):
        return dict(value)
    lines = [str(line) for line in value or ()]
    files = [line for line in lines if _is_file(line)]
    return {"files": files, "messages": [line for line in lines if line not in files]}


def error_of(error: Exception, message: str) -> dict[str, Any]:
    """An error as JSON values: class, message and attributes such as `where`, `given`, `expected`."""
    attributes = {name: getattr(error, name) for name in ATTRIBUTES if getattr(error, name, None) is not None}
    return {"error": {"type": type(error).__name__, "message": message, **attributes}}


def print_json(command: str, content: Mapping[str, Any]) -> None:
    """Prints one line of JSON; values that JSON lacks are printed as text."""
    print(json.dumps({"command": command, **content}, ensure_ascii=False, default=_plain))


def print_lines(lines: Iterable[Any]) -> list[str]:
    """Prints each line at once, and returns them."""
    printed = []
    for line in lines:
        print(line)
        printed.append(str(line))
    return printed


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (set, frozenset)) else str(value)


def _is_file(line: str) -> bool:
    return "\n" not in line and len(line) < 4096 and Path(line).exists()
