"""`--json` prints one object on stdout and `--quiet` nothing but errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.cli import main
from veneer.command_line.output import output, print_json, result_of


@pytest.mark.slow
def test_json_of_a_run_is_its_folder_and_result_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["transfer", "digits", "--method", "linear_probe", "--epochs", "1", f"--out={out}", "--size=16", "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["command"] == "transfer"
    assert Path(record["folder"]) == out
    assert record["result"] == json.loads((out / "result.json").read_text())
    assert "test" in printed.err  # the report


def test_json_of_a_command_that_writes_files_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", str(tmp_path / "photos"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert all(Path(file).exists() for file in record["files"])


def test_json_of_a_list_has_a_record_per_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    assert {"lora", "vpt"} <= {row["name"] for row in json.loads(capsys.readouterr().out)["methods"]}


def test_json_of_an_error_has_its_attributes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--adapter", str(tmp_path / "none"), "--json"]) == 1
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert (error["type"], error["option"], error["file"]) == ("OptionError", "adapter", str(tmp_path / "none"))
    assert printed.err.startswith("veneer: ")


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", str(tmp_path / "photos"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_prints_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none.safetensors"), "--quiet"]) == 1
    assert "none.safetensors" in capsys.readouterr().err


def test_quiet_and_json_print_the_object_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hosts", "--quiet", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["command"] == "hosts"
    assert printed.err == ""


def test_output_restores_the_streams(capsys: pytest.CaptureFixture[str]) -> None:
    with output(quiet=True, as_json=False):
        print("hidden")
    print("shown")
    assert capsys.readouterr().out == "shown\n"


def test_lines_that_are_paths_are_files(tmp_path: Path) -> None:
    assert result_of([str(tmp_path), "rank 4", tmp_path]) == {"files": [str(tmp_path)] * 2, "messages": ["rank 4"]}


def test_json_of_a_wrong_flag_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["control", "train", "--stepz", "3", "--json"])
    assert stop.value.code == 2
    record = json.loads(capsys.readouterr().out)
    assert record["command"] == "control train"
    assert "--stepz" in record["error"]["message"]


def test_json_without_a_result_has_what_was_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["transfer", "digits", "--print-config", "--json"]) == 0
    assert 'data = "digits"' in json.loads(capsys.readouterr().out)["messages"]


def test_json_has_null_for_a_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_json("x", {"loss": float("nan"), "rows": [{"high": float("inf")}]})
    assert json.loads(capsys.readouterr().out) == {"command": "x", "loss": None, "rows": [{"high": None}]}
