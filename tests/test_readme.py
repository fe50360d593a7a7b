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

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))])
def test_links_lead_to_files(page: str) -> None:
    """Those of pages and pictures of this repository."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_commands_are_understood(words: list[str]) -> None:
    parser_for(words).parse_args(words)
