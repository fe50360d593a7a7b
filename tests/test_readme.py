"""The README's blocks run one after the other in one empty folder, as they are pasted; its commands are understood as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doc_blocks import blocks_of, commands_of, run_page
from veneer.cli import parser_for

ROOT = Path(__file__).parents[1]
BLOCKS = blocks_of(ROOT / "README.md")
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [words for kind, block in BLOCKS if kind == "sh" for words in commands_of(block)]


@pytest.mark.parametrize("code", [c for c in PYTHON if "runs/" not in c], ids=lambda code: code.splitlines()[-1][:30])
def test_python_runs_by_itself(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for what a command of the page has written before."""
    monkeypatch.chdir(tmp_path)
    run_page([("python", code)], "README.md", capsys)


@pytest.mark.training
def test_every_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In an empty folder, with short training; what a block names, one before it has made."""
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        run_page([block], "README.md", capsys)


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 10


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_commands_are_understood(words: list[str]) -> None:
    parser_for(words).parse_args(words)
