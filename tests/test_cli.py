"""The command line: help of every command, one-line errors, and flags of the methods."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import veneer
from tests.methods.controls import picture
from veneer.cli import BROKEN_PIPE, log_to_stderr, main, parser_for
from veneer.commands import COMMANDS
from veneer.testing.pipelines import tiny_pipeline


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_every_flag_of_personalize_has_help() -> None:
    import dataclasses

    from veneer.pipelines.personalize import PersonalizeConfig

    from veneer.flags import help_of

    silent = {f.name for f in dataclasses.fields(PersonalizeConfig)} - set(help_of(PersonalizeConfig))
    assert not silent


def test_flags_of_the_named_methods_are_added() -> None:
    words = ["personalize", "photos", "--method", "pivotal", "--rank", "8", "--vectors", "2"]
    found = vars(parser_for(words).parse_args(words))
    assert found["lora.rank"] == 8
    assert found["textual_inversion.vectors"] == 2


def test_flags_of_other_methods_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["personalize", "photos", "--method", "bitfit", "--rank", "8"])
    assert "--rank" in capsys.readouterr().err


def test_a_missing_required_flag_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["caption", str(tmp_path)])
    assert stop.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_an_error_is_one_line_and_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["personalize", str(tmp_path / "nowhere"), "--concept", "<toy>", "--out", str(tmp_path / "out")])
    assert status == 1
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("veneer: ")
    assert "nowhere" in printed


@pytest.mark.parametrize(
    ("words", "given", "meant"),
    [
        ("personalize photos --method lorra", "lorra", "lora"),
        ("personalize photos --method textual_inversion+lorra --rank 3", "lorra", "lora"),
        ("transfer digits --method lorra", "lorra", "lora"),
        ("control train photos --method controlnett", "controlnett", "controlnet"),
        ("compare digits --methods lorra", "lorra", "lora"),
        ("control train photos --condition cany", "cany", "canny"),
        ("personalise photos", "personalise", "personalize"),
        ("control trian photos", "trian", "train"),
    ],
)
def test_a_misspelled_name_is_reported_with_similar_names(
    words: str, given: str, meant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words.split())
    except SystemExit as stop:  # of the parser
        status = stop.code  # type: ignore[assignment]
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status in (1, 2)
    assert f"'{given}'" in said
    assert re.search(rf"\b{meant}\b", said.replace(given, ""))
    assert "vpt" not in said, "the nearest names, not all"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ("inspect", "file"),
        ("convert", "file"),
        ("resize", "file"),
        ("merge", "files"),
        ("extract", "tuned"),
        ("predict", "folder"),
        ("generate", "prompt"),
        ("control generate", "prompt"),
        ("sites", "base"),
    ],
)
def test_a_missing_positional_argument_is_named(command: str, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    usage, _, error = capsys.readouterr().err.partition("error:")
    assert re.search(rf"required: {argument}\b", error)
    assert re.search(rf"(?<!\[){argument}\b", usage)


@pytest.mark.parametrize("command", ["personalize", "transfer", "control train"])
def test_photos_and_data_are_optional(command: str) -> None:
    vars(parser_for(command.split()).parse_args(command.split()))


def test_predict_without_images_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("veneer: ")


def test_version_flag_and_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert veneer.__version__ in capsys.readouterr().out
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_out_of_range_is_an_error(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", f"--port={port}", "--no-browser"]) == 1
    assert port in capsys.readouterr().err


def test_a_port_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        workspace = tmp_path / "workspace"
        assert main(["app", "--port", str(port), "--no-browser", "--workspace", str(workspace)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("veneer: ")
    assert str(port) in said
    assert "--port 0" in said
    assert not workspace.exists()


def test_an_address_of_another_machine_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["app", "--host", "192.0.2.1", "--auth", "anna:correct horse", "--no-browser", "--workspace", str(tmp_path / "w")]
    assert main(words) == 1
    assert "192.0.2.1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["hosts", "methods"])
def test_a_closed_pipe_ends_a_command_without_a_traceback(command: str) -> None:
    start = "import sys; sys.stdout.reconfigure(line_buffering=True); from veneer_command import console; console()"
    process = subprocess.Popen([sys.executable, "-c", start, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()  # before the first line
        assert process.stderr.read() == b""
    assert process.returncode == BROKEN_PIPE


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


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "timm:vit_tiny_patch16_224", "bundled_clip", "open_clip:RN50"])
def test_sites_of_models_of_transfer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", name]) == 0
    assert "features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sites timm:nonsense", "nonsense"),
        ("sites open_clip:nonsense", "nonsense"),
        ("generate x --device nonsense", "nonsense"),
        ("control generate x --device nonsense", "nonsense"),
        ("generate x --steps 0", "--steps"),
        ("generate x --images-per-prompt 0", "--images-per-prompt"),
        ("control generate x --steps -1", "--steps"),
        ("generate x --size 64x", "--size"),
        ("app --device nonsense", "nonsense"),
        ("transfer digits --batch 0", "batch"),
        ("transfer digits --mixed-precision fp13", "fp13"),
        ("transfer digits --learning-rate 0", "learning_rate"),
        ("compare digits --batch 0", "batch"),
        ("compare digits --methods lora(rank=x)", "'x'"),
        ("personalize --batch 0", "batch"),
        ("personalize --steps 0", "steps"),
        ("personalize --learning-rate 0", "learning_rate"),
        ("personalize --eval-seeds -1", "eval_seeds"),
        ("personalize --schedule nonsense", "nonsense"),
        ("personalize --optimizer nonsense", "nonsense"),
        ("personalize --rank 0", "rank"),
        ("personalize --steps ten", "'ten'"),
        ("control train --batch 0", "batch"),
        ("personalize photos --concept <toy> --features timm:resnet18x", "resnet18x"),
    ],
)
def test_an_invalid_value_is_a_one_line_error(
    words: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised before a model is loaded or a run is started."""
    monkeypatch.chdir(tmp_path)
    for name in ("veneer.base_models.load", "veneer.base_models.loading.load"):
        monkeypatch.setattr(name, None)
    try:
        status = main([*words.split(), *(["--no-browser", "--port", "0"] if words.startswith("app") else [])])
    except SystemExit as stop:  # of the parser
        status = stop.code  # type: ignore[assignment]
    assert status in (1, 2)
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert said in last
    assert len(before) == 0 if status == 1 else len(before) <= 15  # a short usage
    assert not (tmp_path / "runs").exists()


def test_a_single_value_of_a_tuple_field_is_not_split_into_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--adapter", str(tmp_path / "nowhere")]) == 1
    assert f"'{tmp_path / 'nowhere'}'" in capsys.readouterr().err


def test_the_app_prints_that_it_starts_before_large_imports() -> None:
    """The start takes many seconds; the message appears in the first."""
    code = (
        "import sys, types, veneer_command; sys.argv = ['veneer', *sys.argv[1:]]\n"
        "console = lambda: print('large' if 'torch' in sys.modules else 'small')\n"
        "sys.modules['veneer.cli'] = types.SimpleNamespace(console=console)\n"
        "veneer_command.console()"
    )
    for words, start in ((["app", "--no-browser"], True), (["app", "--help"], False), (["methods"], False)):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=60)
        *before, last = done.stdout.splitlines()
        assert last == "small"
        assert [line.partition(" is starting")[0] for line in before] == [f"veneer {version('veneer')}"] * start


@pytest.mark.parametrize(
    "words",
    [
        "personalize nowhere --concept <toy>",
        "personalize photos --concept <toy> --base nowhere",
        "personalize photos --concept <toy> --features nowhere",
        "personalize photos --concept <toy> --base nowhere/nowhere",
        "transfer nowhere",
        "control train nowhere",
        "control train photos --base nowhere",
        "control train photos --features nowhere",
        "transfer classes --model nowhere",
        "compare classes --model nowhere",
    ],
)
def test_a_misspelled_data_source_leaves_no_run_folder(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for number, path in enumerate(("photos/a.png", *(f"classes/{kind}/{n}.png" for kind in "ab" for n in range(6)))):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / path)
    assert main(words.split()) == 1
    assert "nowhere" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list((tmp_path / "runs").glob("*"))


def test_a_dry_run_leaves_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    picture(0).save(tmp_path / "photos" / "a.png")
    words = ["personalize", "photos", "--concept", "<toy>", "--base", "base", "--dry-run", "--no-cache"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(words) == 0
    assert not list((tmp_path / "runs").glob("*"))


def test_commands_print_what_the_library_logs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("veneer"), "handlers", [])
    main([])
    logging.getLogger("veneer.somewhere").info("%d of %d", 1, 3)
    logging.getLogger("veneer.somewhere").debug("detail")
    assert capsys.readouterr().err == "1 of 3\n"


def test_messages_are_printed_once_beside_the_handler_of_another_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logging.info` of a library, such as open_clip's, adds a handler to the root logger if it has none."""
    root, logger = logging.getLogger(), logging.getLogger("veneer")
    level, propagate = logger.level, logger.propagate
    for each in (root, logger):
        monkeypatch.setattr(each, "handlers", [])
    try:
        log_to_stderr()
        logging.info("loaded")
        logging.getLogger("veneer.training").info("step 1")
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
    assert capsys.readouterr().err.count("step 1") == 1
