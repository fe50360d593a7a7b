"""Converted configs train: three dataset configs of sd-scripts and two jobs of ai-toolkit, on a tiny base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from veneer.pipelines.convert_config import ConvertConfigConfig, convert_config

from tests.config_conversion.files import ARGUMENTS, JOB, RESOLUTIONS, SECOND_JOB, TAGS, TWO_SUBJECTS, photo_folders, write
from tests.raising import raises
from veneer import OptionError
from veneer.cli import main
from veneer.testing.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text('{"steps": 2}')
    return str(folder)


@pytest.mark.parametrize(
    ("name", "text", "concepts", "flags"),
    [
        ("two.toml", TWO_SUBJECTS, ["zwx", "qvf"], ()),
        ("tags.toml", TAGS, ["zwx"], ()),
        ("resolutions.toml", RESOLUTIONS, ["zwx"], ()),
        ("arguments.toml", ARGUMENTS, ["zwx", "qvf"], ()),
        ("job.yaml", JOB, ["zwx"], ()),
        ("second.yaml", SECOND_JOB, ["qvf"], ("--concept", "qvf")),
    ],
)
def test_a_converted_config_trains(
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    concepts: list[str],
    flags: tuple[str, ...],
) -> None:
    root = photo_folders(tmp_path / "data")
    if name == "arguments.toml":
        write(root, "two_subjects.toml", TWO_SUBJECTS)
    converted = tmp_path / "run.toml"
    assert main(["convert-config", str(write(root, name, text)), "--out", str(converted)]) == 0
    assert str(converted) in capsys.readouterr().out
    out = tmp_path / "out"
    replaced = ["--base", base, "--out", str(out), "--steps", "2", "--eval-seeds", "0", "--tracker", "none"]
    replaced += ["--prediction", "epsilon", "--no-gradient-checkpointing"]
    replaced += ["--checkpoint-every", "0", "--preview-every", "0", "--warmup", "0", "--prompts", "a {concept}"]
    assert main(["personalize", "--config", str(converted), *replaced, *flags]) == 0
    record = json.loads((out / "result.json").read_text())
    assert record["training"]["steps"] == 2
    assert [each["token"] for each in record.get("concepts", [{"token": record["config"]["concept"]}])] == concepts
    assert (out / "adapter.safetensors").is_file()


def test_remarks_are_printed_and_an_existing_file_is_kept(tmp_path: Path) -> None:
    root = photo_folders(tmp_path)
    file = write(root, "tags.toml", TAGS)
    lines = convert_config(ConvertConfigConfig(file))
    assert "tags-veneer.toml" in lines[0]
    assert sum("my_own_key" in line for line in lines) == 1
    assert any(line.startswith("left out: datasets[0].subsets[0].color_aug") for line in lines)
    with raises(OptionError, option="out", given="exists", file=root / "tags-veneer.toml"):
        convert_config(ConvertConfigConfig(file))
