"""Help pages: flags instead of names of fields, defaults, placeholders, groups, and lines that fit."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.command_line.subcommands import SUBCOMMANDS
from veneer.cli import main
from veneer.command_line.flag_groups import GENERATION, GROUPS
from veneer.command_line.help_text import HelpFormatter, with_default
from veneer.command_line.notes import NOTES
from veneer.commands import COMMANDS
from veneer.flags import add_flags

PAGES = [*COMMANDS, "control train", "control generate", "personalize --method pivotal", "transfer --method vpt+ssf"]
Color = Literal["red", "green", "blue", "ultramarine", "vermilion", "chartreuse", "turquoise", "magenta"]


@dataclass(frozen=True)
class Config:
    """Options.

    Args:
        save_dtype: dtype; see `cache_folder` and `float32`.
        cache_folder: folder.
        color: one color.
        shade: one color.
        drift_prompts: texts.
        cache: store results.
    """

    save_dtype: Literal["float32", "float16"] = "float32"
    cache_folder: Path = Path(__file__)
    color: Color = "red"
    shade: Color | None = None
    drift_prompts: tuple[str, ...] = ()
    cache: bool = False


def page(config: type, **settings: object) -> str:
    """The help of a parser, as one line per paragraph."""
    parser = argparse.ArgumentParser(prog="x", formatter_class=HelpFormatter)
    add_flags(parser, config, **settings)  # type: ignore[arg-type]
    return " ".join(parser.format_help().split())


def printed(words: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        main([*words.split(), "--help"])
    return out.getvalue()


def test_fields_in_backticks_become_flags_and_values_stay() -> None:
    assert "dtype; see `--cache-folder` and `float32` (default: float32)" in page(Config)
    assert "see `--lora.cache-folder`" in page(Config, prefix="lora", taken={"--cache-folder"})
    assert "see `cache_folder`" in page(Config, positional=("cache_folder",))


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        (False, "x (default: off)"),
        (True, "x (default: on)"),
        (0.0, "x (default: 0)"),
        (1e-4, "x (default: 0.0001)"),
        (("a photo of a {}.",), "x (default: `a photo of a {}.`)"),
        (("a", "b"), "x (default: a b)"),
        (Path("runs"), "x (default: runs)"),
        (Path("runs").absolute(), "x"),
        (0, "x (default: 0)"),
        (None, "x"),
        ("", "x"),
        ((), "x"),
    ],
)
def test_default_in_the_text(default: object, expected: str) -> None:
    """A path of this machine is not part of a help page."""
    assert with_default("x", default) == expected


def test_a_text_that_names_its_default_gets_no_second_one() -> None:
    assert with_default("x (default: all)", ("a", "b")) == "x (default: all)"


def test_many_choices_are_listed_in_the_text() -> None:
    text = page(Config)
    assert "--color NAME one color (default: red). One of red, green, blue, ultramarine" in text
    assert "--shade NAME one color. One of red," in text
    assert "--save-dtype {float32,float16} dtype" in text
    assert "--drift-prompts PROMPT [PROMPT ...] texts" in text


def test_a_flag_with_and_without_prefix_is_listed_once() -> None:
    text = page(Config, prefix="lora", taken={"--color"}).partition("options:")[2]
    assert "--cache-folder PATH folder" in text
    assert "--cache, --no-cache store" in text
    assert "--lora.color NAME one color" in text
    assert "--lora.cache" not in text


@pytest.mark.parametrize(("words", "groups"), [("personalize", GROUPS), ("transfer", GROUPS), ("control generate", GENERATION)])
def test_flags_of_a_page_are_in_the_order_of_the_groups(
    words: str, groups: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [f"--{name.rstrip('_').replace('_', '-')}" for name in itertools.chain(*groups.values())]
    lines = re.findall(r"^  (--[\w-]+)", printed(words, monkeypatch), re.MULTILINE)
    listed = [flag for flag in lines if flag in order]
    assert len(listed) > 10
    assert listed == sorted(listed, key=order.index)


def test_options_of_methods_follow_the_group_of_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = re.findall(r"^([a-z_ ]+):$", printed("personalize --method pivotal", monkeypatch), re.MULTILINE)
    place = titles.index("method")
    assert titles[place : place + 4] == ["method", "options of textual_inversion", "options of lora", "optimization"]


def test_the_formula_of_a_method_is_above_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed("transfer", monkeypatch).partition("options of lora:\n")[2]
    assert text.startswith("  W' = W + s·B A with s = alpha / rank")


@pytest.mark.parametrize("words", PAGES)
def test_pages_fit_the_terminal_and_name_no_path_of_this_machine(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(words, monkeypatch)
    assert text.startswith(f"usage: veneer {words.partition(' --')[0]} ")
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert str(Path(__file__).parents[2]) not in text
    assert [line for line in text.splitlines() if line.endswith(("`--", "-")) and "[" not in line] == []


def test_notes_are_those_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*NOTES} <= {*COMMANDS, *SUBCOMMANDS}
    for words, paragraphs in NOTES.items():
        text = " ".join(printed(words, monkeypatch).split())
        assert all(paragraph in text for paragraph in paragraphs), words
