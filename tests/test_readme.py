"""The README's Python runs, one block after the other; its commands exist, with the flags that it gives them."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from veneer.cli import parser_for
from veneer.injection import methods

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line.partition("#")[0])[1:]
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("veneer ")
]


@pytest.mark.parametrize("code", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    try:
        exec(compile(code, "README.md", "exec"), vars(module))
    finally:
        methods._registered.pop("gain", None)


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_commands_are_understood(words: list[str]) -> None:
    parser_for(words).parse_args(words)
