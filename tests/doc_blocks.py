"""Code blocks of Markdown pages, run as a reader pastes them."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer import transformer_records
from veneer.cli import main
from veneer.injection import hosts, methods
from veneer.testing.trace import forget_models

FIRST_USE = ("clone", "make", "app", "git", "pip")
"""Words of commands that install the project or start a server; other tests run them."""
TINY_TRAINING = ["--steps", "2", "--eval-seeds", "0", "--preview-steps", "2", "--tracker", "none"]
FEW_IMAGES = ["--epochs", "1", "--shots", "2", "--test", "0.03"]
SHORTER = {
    "personalize": [*TINY_TRAINING, "--prompts", "a {concept}"],
    "control train": [
        *TINY_TRAINING, "--generated-images", "4", "--batch", "2", "--preview-every", "2", "--grid-images", "1",
    ],
    "generate": ["--steps", "2"],
    "control generate": ["--steps", "2"],
    "transfer": FEW_IMAGES,
    "compare": [*FEW_IMAGES, "--seeds", "1", "--batch", "8"],
}  # fmt: skip
"""Command to flags that make it quick; a flag given twice holds its last value."""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of the Python and shell blocks of a page."""
    return re.findall(r"```(python|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(block: str) -> list[list[str]]:
    """Words after `veneer` of each command in a shell block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("veneer ")]


def run_commands(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the commands of a shell block, with short training."""
    for words in commands_of(block):
        if words[0] not in FIRST_USE:
            shorter = SHORTER.get(words[0], SHORTER.get(" ".join(words[:2]), []))
            assert main([*words, *shorter]) == 0, f"veneer {' '.join(words)}: {capsys.readouterr().err}"


@contextlib.contextmanager
def namespace() -> Iterator[types.ModuleType]:
    """A module that blocks run in; what they register is gone afterwards."""
    module = types.ModuleType("page")
    sys.modules["page"] = module
    registries: tuple[Any, ...] = (methods, hosts, transformer_records)
    before = [(registry, set(registry.names())) for registry in registries]
    try:
        yield module
    finally:
        del sys.modules["page"]
        for registry, names in before:
            for name in set(registry.names()) - names:
                registry.unregister(name)
        forget_models()


def run_page(blocks: Iterable[tuple[str, str]], page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the blocks of a page in order, its Python blocks in one namespace."""
    with namespace() as module:
        for kind, block in blocks:
            if kind == "python":
                exec(compile(block, page, "exec"), vars(module))
            else:
                run_commands(block, capsys)
