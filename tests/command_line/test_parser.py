"""The parser names what is similar, keeps a prompt after `--adapter`, and has examples that parse."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from tests.command_line.subcommands import SUBCOMMANDS
from veneer.classification.config import TransferConfig
from veneer.cli import main, parser_for
from veneer.command_line.examples import EXAMPLES, examples_text
from veneer.command_line.flag_groups import GROUPS, group_of
from veneer.commands import COMMANDS
from veneer.control.config import ControlConfig
from veneer.training.personalization_config import PersonalizeConfig


def namespace(line: str) -> dict[str, object]:
    words = shlex.split(line)
    return vars(parser_for(words).parse_args(words))


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_parses(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "veneer"
    assert callable(namespace(shlex.join(words))["run"])


def test_every_command_that_works_on_files_has_an_example() -> None:
    commands = {*COMMANDS, *SUBCOMMANDS} - {"analyze", "prompts", "control"}
    assert commands - {*EXAMPLES} == {"methods", "hosts", "pretrain-base"}
    assert all(line.startswith(f"veneer {command}") for command, lines in EXAMPLES.items() for line in lines)


def test_examples_end_the_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("merge", "control generate"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        assert capsys.readouterr().out.rstrip().endswith(examples_text(command))


@pytest.mark.parametrize("config", [PersonalizeConfig, TransferConfig, ControlConfig])
def test_every_flag_of_a_training_command_is_in_one_group(config: type) -> None:
    names = {field.name for field in dataclasses.fields(config)} - {"photos", "data", "options"}
    assert [name for name in names if group_of(name) is None] == []
    assert sorted(names) == sorted(name for fields in GROUPS.values() for name in fields if name in names)


def test_help_lists_flags_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["personalize", "--help"])
    printed = capsys.readouterr().out
    loss = printed.partition("\nloss:\n")[2].partition("\n\n")[0]
    assert "--min-snr-gamma" in loss
    assert "--steps" not in loss
    assert printed.startswith("usage: veneer personalize [photos] [flags]\n")


@pytest.mark.parametrize(
    ("line", "similar"),
    [
        ("personalize --learning-rat 1e-3", "--learning-rate"),
        ("transfer digits --epoch=3", "--epochs"),
        ("control train --stesp 3", "--steps"),
        ("merge a b --method tie", "ties"),
        ("personalize --mixed-precision bf61", "bf16"),
    ],
)
def test_a_misspelled_flag_or_choice_is_answered_with_the_most_similar(
    line: str, similar: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"did you mean {similar}?" in error_of(line, capsys)


def test_a_flag_before_its_subcommand_is_an_error_that_names_the_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert "control train" in error_of("control --config run.toml train", capsys)


@pytest.mark.parametrize(
    ("line", "adapters", "prompts"),
    [
        ("generate --adapter a b:0.5 'a <toy>'", ["a", "b:0.5"], ["a <toy>"]),
        ("generate 'a <toy>' --adapter a b", ["a", "b"], ["a <toy>"]),
        ("generate --adapter a b -- 'a <toy>' sea", ["a", "b"], ["a <toy>", "sea"]),
        ("generate --adapter a --seed 3 'a <toy>'", ["a"], ["a <toy>"]),
        ("generate --seed=3 --adapter a 'a <toy>'", ["a"], ["a <toy>"]),
        ("generate --adapter a 'a <toy>' --seed 3 --side-by-side", ["a"], ["a <toy>"]),
        ("control generate --adapter a 'a <toy>'", ["a"], ["a <toy>"]),
    ],
)
def test_a_prompt_after_adapters_is_a_prompt(line: str, adapters: list[str], prompts: list[str]) -> None:
    parsed = namespace(line)
    assert (parsed["adapter"], parsed["prompt"]) == (adapters, prompts)


@pytest.mark.parametrize("line", ["generate --adapter user/toy user/style", "control generate --adapter a b:0.5"])
def test_a_second_adapter_is_no_prompt(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: prompt" in error_of(line, capsys)


def test_a_flag_of_the_program_after_its_command_is_placed_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--debug belongs before the command" in error_of("personalize --debug", capsys)


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("personalize --prompts 'a {{concept}}' {path}", "photos"),
        ("transfer --where attn.qkv {path}", "data"),
        ("merge --weights 1 0.5 {path}", "files"),
        ("generate --adapter other {path}", "prompt"),
    ],
)
def test_a_path_that_a_flag_took_is_an_error(line: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it, `personalize --prompts … photos/` would train on the example photos."""
    said = error_of(line.format(path=tmp_path), capsys)
    assert str(tmp_path) in said
    assert f"{missing} is missing" in said
