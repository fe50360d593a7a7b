"""The README's blocks run one after the other in one empty folder, as they are pasted; its commands are understood as written."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from veneer.cli import main, parser_for
from veneer.injection import methods

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", TEXT, re.DOTALL)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
FIRST_USE = ("clone", "make", "app")
"""Words of commands that install the project or start a server; other tests run them."""
TINY_TRAINING = ["--steps", "2", "--eval-seeds", "0", "--tracker", "none"]
SHORTER = {
    "personalize": TINY_TRAINING,
    "control train": [*TINY_TRAINING, "--drawn", "12", "--shown", "1"],
    "transfer": ["--epochs", "1", "--shots", "6"],
    "compare": ["--epochs", "1", "--shots", "6"],
}
"""Command to flags that make it quick; a flag given twice holds its last value."""


def _commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("veneer ")]


COMMANDS = [words for kind, block in BLOCKS if kind == "sh" for words in _commands(block)]


def _shortened(words: list[str]) -> list[str]:
    return [*words, *SHORTER.get(words[0], SHORTER.get(" ".join(words[:2]), []))]


def _run_python(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    try:
        exec(compile(code, "README.md", "exec"), vars(module))
    finally:
        methods._registered.pop("gain", None)


@pytest.mark.parametrize("code", [c for c in PYTHON if "runs/" not in c], ids=lambda code: code.splitlines()[-1][:30])
def test_python_runs_by_itself(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what a command of the page has written before."""
    monkeypatch.chdir(tmp_path)
    _run_python(code, monkeypatch)


def test_every_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In an empty folder, with short training; what a block names, one before it has made."""
    monkeypatch.chdir(tmp_path)
    for kind, block in BLOCKS:
        if kind == "python":
            _run_python(block, monkeypatch)
        for words in _commands(block) if kind == "sh" else ():
            if words[0] not in FIRST_USE:
                assert main(_shortened(words)) == 0, f"veneer {' '.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))])
def test_links_lead_to_files(page: str) -> None:
    """Those of pages and pictures of this repository."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_commands_are_understood(words: list[str]) -> None:
    parser_for(words).parse_args(words)
