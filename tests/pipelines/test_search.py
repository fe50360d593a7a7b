"""`veneer search` on a small ViT: its files, the repeated choice, prediction, exact resume after a kill, and its errors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.search import SearchConfig, search

from tests.classification.small import CLASSES, image_folder, model_folder
from tests.pipelines.blank_plots import rendered_plots
from tests.raising import raises
from veneer.classification.models.classifier import Classifier
from veneer.cli import main
from veneer.injection.errors import OptionError, VeneerError

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
import timm
from veneer.classification.search.supernet import Supernet
from veneer.classification.search.trial_log import TrialLog
from veneer.pipelines.search import SearchConfig, search

data, model, out = sys.argv[1:]
append, sample = TrialLog._append, Supernet.sample

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def append_part(self, record):
    if record["trial"] == 2:
        with open(self.file, "ab", buffering=0) as file:
            file.write(b'{"trial": 2, "sizes"')
        kill()
    append(self, record)

def sample_or_kill(self, step):
    if step == 3:
        kill()
    return sample(self, step)

for name, change in (("supernet", (append, sample_or_kill)), ("trial", (append_part, sample))):
    if not (child := os.fork()):  # the imports are shared, and nothing has computed yet
        TrialLog._append, Supernet.sample = change
        search(SearchConfig(**OPTIONS, data=data, model=model, out=Path(out), resume=True))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    checkpoints = sorted(path.name for path in Path(out, "supernet").glob("checkpoint-*"))
    print(name, os.WTERMSIG(status), *checkpoints, os.path.exists(os.path.join(out, "trials.jsonl")))
"""
OPTIONS: dict[str, Any] = {
    "budget_parameters": 700, "sizes": (1, 2), "trials": 4, "population": 2, "parents": 2, "supernet_epochs": 2,
    "trial_epochs": 1, "epochs": 1, "batch": 6, "validation": 0.3, "test": 0.2, "workers": 1, "baselines": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"data": str(image_folder(folder / "images", 8)), "model": str(model_folder(folder, "vit"))}


@pytest.fixture(scope="module")
def noah(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SearchConfig(**{**OPTIONS, "baselines": True}, **inputs, out=tmp_path_factory.mktemp("runs") / "noah")
    with rendered_plots():
        return search(config)


def record_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def tensors_of(folder: Path) -> dict[str, bytes]:
    with safe_open(folder / "adapter.safetensors", "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def test_the_run_folder_has_the_front_the_plot_and_the_comparison(noah: Path) -> None:
    record, trials = record_of(noah), [json.loads(line) for line in (noah / "trials.jsonl").read_text().splitlines()]
    assert record["trials"] == len(trials) == 4
    assert (noah / "pareto.png").read_bytes().startswith(b"\x89PNG")
    best = min(trials, key=lambda trial: (-trial["val_accuracy"], trial["val_loss"]))
    assert record["front"][-1]["sizes"] == best["sizes"]
    rows = {row["label"]: row for row in record["rows"]}
    assert {*rows} == {"search", "lora", "adaptformer", "vpt"}
    assert rows["search"]["parameters"] == best["parameters"]
    head = 3 * 24 + 3
    for label, row in rows.items():
        result = record_of(noah / row["folder"])
        assert result["trainable_parameters"] - head == row["parameters"] <= 700, label
        assert (result["test_accuracy"], result["val_accuracy"]) == (row["test_accuracy"], row["val_accuracy"])
        page = (noah / "search.md").read_text()
        assert f"| {label} | {row['parameters']:,} |" in page


def test_the_config_of_the_chosen_one_repeats_it_bitwise(noah: Path, tmp_path: Path) -> None:
    assert main(["transfer", "--config", str(noah / "best" / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    assert tensors_of(tmp_path / "again") == tensors_of(noah / "best")
    methods = {each["name"]: each for each in record_of(tmp_path / "again")["methods"]}
    sizes = record_of(noah)["front"][-1]["sizes"]
    assert {*methods} == {name for name, row in sizes.items() if any(row)} | {"linear_probe"}


def test_predict_opens_the_chosen_one_as_any_run(noah: Path, inputs: dict[str, str]) -> None:
    image = Path(inputs["data"]) / "red" / "0.png"
    (line,) = [line for line in predict(PredictConfig(noah / "best", (image,))) if "0.png" in line]
    assert any(name in line for name in CLASSES)


def assert_same_search(folder: Path, reference: Path) -> None:
    """Equal trials bitwise, and equal weights of the chosen sub-network."""
    assert (folder / "trials.jsonl").read_bytes() == (reference / "trials.jsonl").read_bytes()
    assert record_of(folder)["front"] == record_of(reference)["front"]
    assert tensors_of(folder / "best") == tensors_of(reference / "best")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_search_that_is_killed_twice_makes_the_same_choice(noah: Path, inputs: dict[str, str], tmp_path: Path) -> None:
    """First in the supernet's training, after a checkpoint, then in the middle of a line of the third trial."""
    out, code = tmp_path / "noah", KILLED.replace("OPTIONS", repr(OPTIONS))
    arguments = [sys.executable, "-c", code, inputs["data"], inputs["model"], str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    killed = int(signal.SIGKILL)
    assert [line for line in done.stdout.splitlines() if "checkpoint-" in line] == [
        f"supernet {killed} checkpoint-000002 False", f"trial {killed} checkpoint-000002 checkpoint-000004 True",
    ], done.stderr  # fmt: skip
    assert not (out / "trials.jsonl").read_bytes().endswith(b"\n")
    assert main(["search", "--config", str(out / "config.toml"), "--resume", "--out", str(out)]) == 0
    assert_same_search(out, noah)


@pytest.mark.parametrize("space", ["blocks", "s4"])
def test_trials_that_were_trained_alone_are_not_repeated(space: str, inputs: dict[str, str], tmp_path: Path) -> None:
    methods = "lora, vpt" if space == "blocks" else "adaptformer, bitfit, lora"
    config = SearchConfig(**{**OPTIONS, "budget_parameters": 1500, "trials": 3}, **inputs, space=space, methods=methods)  # type: ignore[arg-type]
    whole = search(dataclasses.replace(config, out=tmp_path / "whole"))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    lines = (whole / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (resumed / "trials.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    shutil.copy(whole / "splits.json", resumed)
    first = (resumed / "trials.jsonl").stat().st_ino
    search(dataclasses.replace(config, out=resumed, resume=True))
    assert (resumed / "trials.jsonl").stat().st_ino == first  # appended to, not written again
    assert_same_search(resumed, whole)
    assert not (whole / "trial").exists()


def test_a_finished_search_is_not_overwritten(noah: Path, inputs: dict[str, str]) -> None:
    before = (noah / "result.json").stat().st_mtime_ns
    with raises(VeneerError, file=str(noah), where="out", given="finished"):
        search(SearchConfig(**OPTIONS, **inputs, out=noah))
    assert search(SearchConfig(**OPTIONS, **inputs, out=noah, resume=True)) == noah
    assert (noah / "result.json").stat().st_mtime_ns == before


def test_a_resumed_search_trains_rows_with_other_options_again(noah: Path, inputs: dict[str, str], tmp_path: Path) -> None:
    """The search was stopped before its results; then it continues with other `workers`, and with more epochs."""
    out = shutil.copytree(noah, tmp_path / "noah", ignore=shutil.ignore_patterns("single-*"))
    before, result = tensors_of(noah / "best"), (noah / "best" / "result.json").read_bytes()
    for options in ({"workers": 2}, {"epochs": 2}):
        (out / "result.json").unlink()
        search(SearchConfig(**{**OPTIONS, **options}, **inputs, out=out, resume=True))
        kept = "workers" in options
        assert ((out / "best" / "result.json").read_bytes() == result) == kept
        assert (tensors_of(out / "best") == before) == kept
    (row,) = record_of(out)["rows"]
    assert row["val_accuracy"] == record_of(out / "best")["val_accuracy"]
    assert "epochs = 2" in (out / "best" / "config.toml").read_text().splitlines()


@pytest.mark.parametrize(
    ("options", "option", "given"),
    [
        ({"budget_parameters": 0}, "budget_parameters", 0),
        ({"space": "random"}, "space", "random"),
        ({"sizes": (4, 2)}, "sizes", (4, 2)),
        ({"sizes": ()}, "sizes", ()),
        ({"population": 1}, "population", 1),
        ({"mutation": 1.5}, "mutation", 1.5),
        ({"groups": 0}, "groups", 0),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], option: str, given: object) -> None:
    with raises(OptionError, option=option, given=given):
        SearchConfig(**{**OPTIONS, **options})


@pytest.mark.parametrize(("weights", "same"), [("random", False), ("published", False), ("3f0c", True)])
def test_trials_of_another_model_have_other_settings(weights: str, same: bool) -> None:
    """A hash of the weights identifies the model, wherever its file is."""
    config = SearchConfig(**OPTIONS)
    base, moved = (
        Classifier(torch.nn.Identity(), name, {}, (), weights, fresh=True).identity
        for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
    )
    assert (config.settings("splits", base) == config.settings("splits", moved)) == same
    assert config.settings("splits", base) != config.settings("other", base)
    assert config.settings("splits", base) != dataclasses.replace(config, seed=1).settings("splits", base)


def test_errors_before_the_first_trial_leave_no_folder(inputs: dict[str, str], tmp_path: Path) -> None:
    config = SearchConfig(**OPTIONS, **inputs, out=tmp_path / "run")
    with raises(OptionError, option="budget_parameters", given=23, expected=24):
        search(dataclasses.replace(config, budget_parameters=23))
    with raises(OptionError, option="model", given="bundled_clip"):
        search(dataclasses.replace(config, model="bundled_clip"))
    assert not (tmp_path / "run").exists()


def test_the_command_needs_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["search", "digits", "--trials", "2"])
    assert stop.value.code == 2
    assert "--budget-parameters" in capsys.readouterr().err
