"""Config files of commands: names and types, errors, flags that win, and runs that are repeated by their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tests.raising import raises
from tests.training.images import save
from veneer import OptionError
from veneer.cli import main, parser_for
from veneer.config_file import entries_of, read_config, to_toml
from veneer.flags import values
from veneer.methods.reparameterized.low_rank.lora import LoRA
from veneer.testing.pipelines import tiny_pipeline


@dataclass(frozen=True)
class Config:
    """Every type that a config of a command has."""

    folder: Path
    rank: int = 4
    alpha: float | None = None
    kind: Literal["a", "b"] = "a"
    bias: bool = False
    word: str = ""
    words: str | tuple[str, ...] = ""
    names: tuple[str, ...] = ()
    where: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


CONTENT = """
folder = "photos"
rank = 8
alpha = 2
kind = "b"
bias = true
word = "toy"
words = ["a", "b"]
names = "one"
where = ["attn"]
size = [64, 96]
ranks = {a = 1}
"""


def config_of(text: str, path: Path) -> dict[str, Any]:
    path.write_text(text)
    return values(Config, entries_of(read_config(["personalize", "--config", str(path)]), Config))


def test_values_have_the_types_of_the_config(tmp_path: Path) -> None:
    assert config_of(CONTENT, tmp_path / "run.toml") == {
        "folder": Path("photos"), "rank": 8, "alpha": 2, "kind": "b", "bias": True, "word": "toy", "words": ("a", "b"),
        "names": ("one",), "where": ("attn",), "size": (64, 96), "ranks": {"a": 1},
    }  # fmt: skip
    yaml = "folder: photos\nalpha: 0.5\nnames: [x, y]\nranks:\n  a: 2\n"
    assert config_of(yaml, tmp_path / "run.yaml") == {
        "folder": Path("photos"), "alpha": 0.5, "names": ("x", "y"), "ranks": {"a": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rank = 1.5", "a whole number"), ("rank = true", "a whole number"), ('rank = "4"', "a whole number"),
        ('alpha = "x"', "a number"), ("alpha = false", "a number"), ('kind = "c"', "one of 'a', 'b'"),
        ("bias = 1", "true or false"), ("folder = 3", "a path"), ("word = 3", "a string"), ("names = [1]", "a list"),
        ("size = [1]", "a list"), ('size = ["a", "b"]', "a list"), ("ranks = 3", "a table of whole numbers"),
        ('factors = {a = "x"}', "a table of numbers"), ("ranks = {a = 1.5}", "a table of whole numbers"),
        ("words = 1", "a string or a list"),
    ],
)  # fmt: skip
def test_values_of_other_types_are_errors(line: str, expected: str, tmp_path: Path) -> None:
    with raises(OptionError, option="config", where=line.split()[0], expected=expected):
        config_of(line, tmp_path / "run.toml")


def test_unknown_names_are_errors_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[lora]\nrnak = 4")
    content = read_config(["--config", str(tmp_path / "run.toml")])
    with raises(OptionError, where="lora.rnak", given="lora.rnak") as caught:
        entries_of(content, Config, {"lora": LoRA})
    assert "'rank'" in str(caught.value)
    with raises(OptionError, where="lora", given="lora"):  # a method that is not in use
        entries_of(content, Config)
    for name in ("fodler", "options"):
        with raises(OptionError, where=name, given=name):
            config_of(f'{name} = "x"', tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("name", "text", "given"),
    [
        ("run.json", "{}", ".json"), ("missing.toml", None, "unreadable"), ("run.toml", "a = = 1", "syntax"),
        ("run.yaml", "a: [", "syntax"), ("run.yaml", "- a", "list"),
    ],
)  # fmt: skip
def test_files_that_are_no_config(name: str, text: str | None, given: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with raises(OptionError, where=str(tmp_path / name), given=given):
        read_config(["personalize", f"--config={tmp_path / name}"])


def test_several_files_and_a_name_in_two_spellings_are_errors(tmp_path: Path) -> None:
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text("learning_rate = 1.0\nlearning-rate = 2.0")
    files = [str(tmp_path / name) for name in ("a.toml", "b.toml")]
    with raises(OptionError, where="config", given=tuple(files)):
        read_config(["personalize", "--config", files[0], f"--config={files[1]}"])
    with raises(OptionError, where=files[0], given=("learning-rate",)):
        read_config(["--config", files[0]])


def test_yaml_has_numbers_without_a_point_and_words_for_false(tmp_path: Path) -> None:
    assert config_of("alpha: 1e-3", tmp_path / "run.yaml") == {"alpha": 1e-3}
    assert config_of("factors: {unet: 1e-1, text: 2}", tmp_path / "run.yaml") == {"factors": {"unet": 0.1, "text": 2}}
    with raises(OptionError, where="word", given=False) as caught:
        config_of("word: no", tmp_path / "run.yaml")
    assert "quotes" in str(caught.value)


def test_files_of_windows_editors_and_home_folders(tmp_path: Path) -> None:
    (tmp_path / "run.TOML").write_bytes('folder = "~/photos"'.encode("utf-8-sig"))
    assert entries_of(read_config(["--config", str(tmp_path / "run.TOML")]), Config) == {"folder": Path.home() / "photos"}


def test_options_of_another_method_say_which_one_is_trained(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[dora]\nrank = 4")
    with raises(OptionError, where="dora", given="dora", expected=("lora",)):
        entries_of(read_config(["--config", str(tmp_path / "run.toml")]), Config, {"lora": LoRA})
    (tmp_path / "run.toml").write_text('method = ["lora"]')
    with raises(OptionError, where="method", given=["lora"]):
        parser_for(["personalize", "--config", str(tmp_path / "run.toml")])


def test_a_flag_is_not_abbreviated(tmp_path: Path) -> None:
    """`--conf` would otherwise be accepted, and its file ignored."""
    (tmp_path / "run.toml").write_text("seed = 3")
    with pytest.raises(SystemExit) as stopped:
        main(["personalize", "--conf", str(tmp_path / "run.toml"), "--print-config"])
    assert stopped.value.code == 2


def test_values_of_numpy_are_written() -> None:
    config = Config(Path("x"), rank=np.int64(3), alpha=np.float32(0.5), names=("a", None))  # type: ignore[arg-type]
    assert {"rank = 3", "alpha = 0.5", 'names = ["a"]'} <= set(to_toml("personalize", config).splitlines())


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main([*words, "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["personalize", "photos", "--concept", "<x>", "--method", "pivotal", "--lora.rank", "3", "--prompts", "a", 'b "c"'],
        ["personalize", "photos", "--method", "lora", "--by-site", "mlp.*:rank=4,alpha=2", "--quantize", "unet=nf4"],
        ["control", "train", "--method", "t2i_adapter", "--learning-rate", "1e-5"],
        ["transfer", "digits", "--method", "ssf+lora", "--lora.rank", "3", "--where", "attn", "mlp"],
        ["generate", "a cat", "--size", "96x64", "--offload", "model"],
        ["compare", "digits", "--methods", "lora, ssf"],
        ["merge", "a.safetensors", "b.safetensors", "--out", "c.safetensors"],
    ],
)
def test_a_printed_config_is_the_same_command(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *words)
    (tmp_path / "run.toml").write_text(text)
    name = words[:2] if words[0] == "control" else words[:1]
    again = printed(capsys, *name, "--config", str(tmp_path / "run.toml"), *(["--out", "c"] if name == ["merge"] else []))
    assert again == text


def test_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(
        'photos = "a"\nsteps = 3\nflip = 0.5\nprompts = ["x", "y"]\nmethod = "lora"\n[lora]\nrank = 3'
    )
    flags = ["b", "--steps", "9", "--prompts", "z", "--rank", "5"]
    text = printed(capsys, "personalize", *flags, "--config", str(tmp_path / "run.toml"))
    assert {'photos = "b"', "steps = 9", "flip = 0.5", 'prompts = ["z"]', "rank = 5"} <= set(text.splitlines())


def test_a_required_argument_may_be_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("seed = 3")
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--config", str(tmp_path / "run.toml")])
    assert stopped.value.code == 2
    (tmp_path / "run.toml").write_text('prompt = ["a cat"]')
    assert 'prompt = ["a cat"]' in printed(capsys, "generate", "--config", str(tmp_path / "run.toml"))
    (tmp_path / "run.toml").write_text('folder = "runs/x"')
    text = printed(capsys, "predict", "a.png", "b.png", "--config", str(tmp_path / "run.toml"))
    assert {'folder = "runs/x"', 'images = ["a.png", "b.png"]'} <= set(text.splitlines())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Photos and a tiny base model."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        save(tmp_path / "photos" / f"{i}.png", 48, 40, seed=i)
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "veneer.json").write_text('{"steps": 2}')
    return str(tmp_path / "photos"), str(tmp_path / "base")


@pytest.mark.training
@pytest.mark.parametrize("command", ["personalize", "control train", "transfer"])
def test_a_run_is_repeated_by_its_config(command: str, folders: tuple[str, str], tmp_path: Path) -> None:
    """Bitwise: by flags, and by the file that this run has written."""
    photos, base = folders
    words = {
        "personalize": [photos, "--concept", "<toy>", "--class-word", "cat", "--base", base, "--steps", "3", "--eval-seeds", "0",
                        "--method", "pivotal", "--lora.rank", "2", "--learning-rate", "0.01", "--prompts", "a {concept}"],
        "control train": [photos, "--base", base, "--steps", "2", "--method", "t2i_adapter", "--eval-seeds", "0",
                          "--preview-every", "0", "--template", "a cat", "--validation", "0.25", "--seed", "3"],
        "transfer": ["digits", "--method", "lora", "--lora.rank", "2", "--epochs", "1", "--shots", "4", "--size", "16"],
    }[command]  # fmt: skip
    tracker = [] if command == "transfer" else ["--tracker", "none"]
    assert main([*command.split(), *words, *tracker, "--out", str(tmp_path / "flags")]) == 0
    config = tmp_path / "flags" / "config.toml"
    assert main([*command.split(), "--config", str(config), "--out", str(tmp_path / "again")]) == 0
    first, second = (tmp_path / name / "adapter.safetensors" for name in ("flags", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "again" / "config.toml").read_text() == config.read_text()


@pytest.mark.training
def test_a_rejected_start_keeps_the_config_of_the_run(folders: tuple[str, str], tmp_path: Path) -> None:
    photos, base = folders
    words = ["personalize", photos, "--concept", "<toy>", "--base", base, "--method", "lora", "--eval-seeds", "0",
             "--tracker", "none", "--steps", "2", "--checkpoint-every", "1", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main([*words, "--rank", "2"]) == 0
    config = (tmp_path / "run" / "config.toml").read_text()
    assert main([*words, "--rank", "3", "--resume"]) == 1
    assert (tmp_path / "run" / "config.toml").read_text() == config
    assert main([*words[:-2], "--rank", "2", "--resume"]) == 1, "which folder?"
