"""The command line: every command answers, errors are one line, methods bring their flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.cli import COMMANDS, main, parser_for


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_every_flag_of_personalize_says_what_it_does() -> None:
    import dataclasses

    from veneer.pipelines.personalize import PersonalizeConfig

    from veneer.flags import help_of

    silent = {f.name for f in dataclasses.fields(PersonalizeConfig)} - set(help_of(PersonalizeConfig))
    assert not silent


def test_methods_bring_their_flags() -> None:
    words = ["personalize", "photos", "--method", "pivotal", "--rank", "8", "--vectors", "2"]
    found = vars(parser_for(words).parse_args(words))
    assert found["lora.rank"] == 8
    assert found["textual_inversion.vectors"] == 2


def test_flags_of_methods_that_are_not_trained_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["personalize", "photos", "--method", "bitfit", "--rank", "8"])
    assert "--rank" in capsys.readouterr().err


def test_an_error_is_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["personalize", str(tmp_path / "nowhere"), "--concept", "<toy>", "--out", str(tmp_path / "out")])
    assert status == 1
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("veneer: ")
    assert "nowhere" in printed


def test_photos_need_a_concept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["personalize", str(tmp_path)]) == 1
    assert "--concept" in capsys.readouterr().err


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert "lora" in printed
    assert "vpt" in printed


def test_sites_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "timm:vit_tiny_patch16_224"]) == 0
    assert "attn.q" in capsys.readouterr().out


def test_one_prompt_and_one_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single word for a field of several is still one word, not its letters."""
    assert main(["generate", "a cat", "--adapter", str(tmp_path / "nowhere")]) == 1
    assert f"'{tmp_path / 'nowhere'}'" in capsys.readouterr().err
