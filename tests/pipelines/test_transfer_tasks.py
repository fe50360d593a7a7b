"""`veneer transfer --tasks` and `veneer predict --task`: scores and files of each task, resume after a kill and a stop."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.models.loading import open_classifier
from veneer.classification.predict import open_predictor
from veneer.injection import attachments
from veneer.injection.errors import OptionError, UnknownName
from veneer.training.loop.trainer import Trainer

HYPER: dict[str, Any] = {"reduction": 4, "embedding": 8, "hidden": 8, "projected": 8}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tasks, of three and of two colors, and a model."""
    parent = tmp_path_factory.mktemp("tasks")
    colors = image_folder(parent / "colors", count=12)
    pairs = image_folder(parent / "pairs", count=8, seed=1)
    shutil.rmtree(pairs / "green")
    return {"colors": colors, "pairs": pairs, "model": model_folder(parent, "vit")}


def config(places: dict[str, Path], out: Path, **options: Any) -> TransferConfig:
    shared: dict[str, Any] = {"method": "hyperformer_plus_plus", "options": {"hyperformer_plus_plus": HYPER}, "epochs": 4}
    shared |= {"batch": 8, "augment": "flip", "workers": 1, "test": 0.25, "validation": 0.2, "learning_rate": 1e-3, "lp_ft": True}
    data = {"data": f"colors={places['colors']}", "more_data": (str(places["pairs"]),), "tasks": True}
    return TransferConfig(model=str(places["model"]), out=out, **{**shared, **data, **options})


def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, places: dict[str, Path]) -> Path:
    return transfer(config(places, tmp_path_factory.mktemp("run") / "whole"))


def test_scores_of_each_task_and_their_mean_are_recorded(whole: Path) -> None:
    record = result(whole)
    assert {*record["tasks"]} == {"colors", "pairs"}
    for split in ("test", "val"):
        scores = [task[f"{split}_accuracy"] for task in record["tasks"].values()]
        assert record[f"{split}_accuracy"] == pytest.approx(sum(scores) / 2)
    assert record["chosen"] == max(record["epochs"], key=lambda e: (e["val_accuracy"], -e["val_loss"], -e["step"]))
    assert record["test_accuracy"] > 0.6, "a constant class has 5 / 12"
    assert record["tasks"]["pairs"]["classes"] == ["blue", "red"]
    assert record["tasks"]["colors"]["images"] == {"train": 21, "validation": 6, "test": 9}
    assert sum(map(sum, record["test"]["tasks"]["pairs"]["confusion"])) == record["tasks"]["pairs"]["images"]["test"]
    sizes = [record["tasks"][name]["images"]["train"] ** 0.1 for name in ("colors", "pairs")]
    assert record["tasks"]["colors"]["probability"] == pytest.approx(sizes[0] / sum(sizes))
    for name in ("colors", "pairs"):
        assert {"confusion.png", "mistakes.png"} <= {path.name for path in (whole / "tasks" / name).iterdir()}
    stored = load_file(whole / "adapter.safetensors")
    assert [tuple(t.shape) for name, t in stored.items() if "head" in name and t.ndim == 2] == [(5, 24)], "one file, both heads"


def test_predictions_of_a_task_are_those_of_the_run(whole: Path, places: dict[str, Path]) -> None:
    table = json.loads((whole / "splits.json").read_text())
    for name, classes in (("colors", {"blue", "green", "red"}), ("pairs", {"blue", "red"})):
        predictor = open_predictor(whole, task=name)
        own = [(file.partition("/")[2], label.partition("/")[2]) for file, label, _ in table["test"] if file.startswith(name)]
        answers = list(predictor.predict([places[name] / file for file, _ in own]))
        right = [answer.label == label for answer, (_, label) in zip(answers, own, strict=True)]
        assert sum(right) / len(right) == result(whole)["tasks"][name]["test_accuracy"]
        assert {answers[0].label, *(label for label, _ in answers[0].others)} == classes
    lines = list(predict(PredictConfig(whole, (places["pairs"] / "red",), task="pairs", format="json")))
    assert len(lines) == 8


def test_the_task_changes_the_generated_adapters_and_detaching_restores_the_model(whole: Path, places: dict[str, Path]) -> None:
    predictor = open_predictor(whole, task="pairs")
    model, pixels = predictor.classifier.model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hyper, head = attachments(model)
    with torch.no_grad():
        outputs = [predictor.logits(pixels)]
        for name in ("colors", "pairs"):
            hyper.task = name
            outputs.append(predictor.logits(pixels))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert torch.equal(outputs[0], outputs[2]), "the adapters of the task that was asked for"
    for attachment in (head, hyper):
        attachment.detach()
    fresh = open_classifier(str(places["model"]), ["x"] * 5, seed=0).model
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_task_that_is_missing_or_unknown_is_an_error(whole: Path, tmp_path: Path) -> None:
    with raises(OptionError, option="task", given=None, expected=("colors", "pairs")):
        open_predictor(whole)
    with raises(UnknownName, kind="task", name="pears", close=("pairs",), expected=("colors", "pairs")):
        open_predictor(whole, task="pears")
    for name in ("model.json", "adapter.safetensors"):
        shutil.copy(whole / name, tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    del record["tasks"]
    (tmp_path / "model.json").write_text(json.dumps(record))
    with raises(OptionError, option="task", given="colors", expected=None):
        open_predictor(tmp_path, task="colors")


@contextmanager
def at_step(number: int, act: Any) -> Iterator[None]:
    """Calls `act(trainer)` after a step."""
    report = Trainer._report

    def acting(self: Trainer, *rest: Any) -> None:
        report(self, *rest)
        if self.step == number:
            act(self)

    Trainer._report = acting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._report = report  # type: ignore[method-assign]


def run_and_die(places: dict[str, str], out: str, threads: int) -> None:
    """Trains until step 5 and kills the process, between the checkpoints of steps 3 and 6."""
    torch.set_num_threads(threads)  # sums in another order differ in the last bit
    with at_step(5, lambda trainer: os.kill(os.getpid(), signal.SIGKILL)):
        transfer(config({name: Path(path) for name, path in places.items()}, Path(out)))


def test_a_run_that_was_killed_and_stopped_resumes_bitwise(whole: Path, places: dict[str, Path], tmp_path: Path) -> None:
    cut = config(places, tmp_path / "cut")
    names = {name: str(path) for name, path in places.items()}
    script = f"from {__name__} import run_and_die; run_and_die({names!r}, {str(cut.out)!r}, {torch.get_num_threads()})"
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-000003"]
    resumed = dataclasses.replace(cut, resume=True)
    with at_step(7, lambda trainer: trainer.stop()):
        transfer(resumed)
    assert not (tmp_path / "cut" / "result.json").exists()
    assert open_predictor(tmp_path / "cut", task="pairs").classifier.classes == ("blue", "red")
    transfer(resumed)
    tensors, expected = (load_file(folder / "adapter.safetensors") for folder in (tmp_path / "cut", whole))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    one, other = result(tmp_path / "cut"), result(whole)
    assert one["epochs"] == other["epochs"]
    assert one["tasks"] == other["tasks"]


def test_methods_without_tasks_share_their_parameters(places: dict[str, Path], tmp_path: Path) -> None:
    """LoRA beside a head that is initialized with the probe of each task, and the head alone on cached features."""
    out = transfer(config(places, tmp_path / "lora", method="lora", options={}, class_weights="balanced", epochs=1))
    assert result(out)["test_accuracy"] >= 0.8
    probe = transfer(config(places, tmp_path / "probe", method="linear_probe", options={}, epochs=1))
    assert result(probe)["training"]["cached_features"]
    assert result(probe)["test_accuracy"] >= 0.8


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"tasks": False}, "more_data"),
        ({"tasks": False, "more_data": ()}, "method"),
        ({"more_data": ()}, "tasks"),
        ({"model": "bundled_clip"}, "model"),
        ({"multi_label": True}, "multi_label"),
        ({"search": 3}, "search"),
        ({"method": "dam_vp", "options": {}}, "method"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(places: dict[str, Path], tmp_path: Path, options: dict[str, Any], option: str) -> None:
    with raises(OptionError, option=option):
        transfer(dataclasses.replace(config(places, tmp_path / "run"), **options))
    with raises(OptionError, option="task_temperature", given=0.0):
        config(places, tmp_path / "run", task_temperature=0.0)
