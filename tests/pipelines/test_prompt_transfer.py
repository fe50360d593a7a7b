"""`veneer prompts transfer`: to another task of the same model, and by a projector to another model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer.pipelines.prompts import PromptTransferConfig, transfer_prompt
from veneer.pipelines.transfer import transfer

from tests.classification.export_cases import clip_name
from tests.classification.small import image_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.predict import open_predictor
from veneer.injection import LoadError, OptionError
from veneer.prompt_transfer import PromptProjector, average_similarity, read_soft_prompt, squared_distance

TOKENS = {"prompt_tuning": {"tokens": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of a small CLIP and of the bundled one, trained on the same images, and images of other classes."""
    parent = tmp_path_factory.mktemp("transfer")
    images = image_folder(parent / "images", count=8)
    others = image_folder(parent / "others", count=8, seed=1)
    for name in ("blue", "green"):
        (others / name).rename(others / f"{name} sky")
    usual: dict[str, Any] = {"data": str(images), "method": "prompt_tuning", "options": TOKENS, "batch": 8, "workers": 1}
    transfer(TransferConfig(**usual, steps=3, model=clip_name(parent), weights="none", out=parent / "small"))
    transfer(TransferConfig(**usual, steps=3, model="bundled_clip", out=parent / "bundled"))
    return parent


def config(folder: Path, **options: Any) -> PromptTransferConfig:
    usual: dict[str, Any] = {
        "file": folder / "small", "to": "bundled_clip", "data": str(folder / "images"), "hidden": 8, "steps": 3, "epochs": 0,
        "batch": 8, "workers": 1,
    }  # fmt: skip
    return PromptTransferConfig(**{**usual, **options})


def accuracies(lines: list[str]) -> dict[str, float]:
    (line,) = (line for line in lines if line.startswith("test accuracy"))
    return {name: float(value) for name, value in re.findall(r"(\w+) prompt ([\d.]+)%", line)}


def test_task_tuning_and_a_task_that_the_projector_has_not_seen(folder: Path, tmp_path: Path) -> None:
    lines = list(transfer_prompt(config(folder, steps=40, learning_rate=0.01, epochs=2, out=tmp_path / "tuned")))
    assert {*accuracies(lines)} == {"transferred", "random", "no"}
    record = json.loads((tmp_path / "tuned/result.json").read_text())
    assert record["test"]["transferred"] == pytest.approx(accuracies(lines)["transferred"] / 100, abs=1e-3)
    projector, models = PromptProjector.load(tmp_path / "tuned")
    source, projected = read_soft_prompt(folder / "small"), read_soft_prompt(tmp_path / "tuned")
    torch.testing.assert_close(projected.vectors, projector(source.vectors).detach())
    assert models == {"source": source.base, "target": projected.base}
    assert projected.base == read_soft_prompt(folder / "bundled").base != source.base
    trained = read_soft_prompt(tmp_path / "tuned/random").vectors
    assert record["similarity"][0] == pytest.approx(average_similarity({"": projected.vectors}, {"": trained}), abs=1e-5)
    further = read_soft_prompt(tmp_path / "tuned/transferred").vectors
    assert squared_distance(further, projected.vectors) < squared_distance(further, trained) / 4
    assert open_predictor(tmp_path / "tuned").logits(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    epochs = json.loads((tmp_path / "tuned/random/result.json").read_text())["epochs"]
    assert record["goal"] == max(epoch["val_accuracy"] for epoch in epochs)
    after = json.loads((tmp_path / "tuned/transferred/result.json").read_text())["epochs"]
    curves = {
        "random": [(epoch["step"], epoch["val_accuracy"]) for epoch in epochs],
        "transferred": [(0, record["validation"]["transferred"]), *((e["step"], e["val_accuracy"]) for e in after)],
    }
    for name, curve in curves.items():
        assert record["steps"][name] == next((step for step, accuracy in curve if accuracy >= record["goal"]), None)

    again = config(folder, data=str(folder / "others"), projector=tmp_path / "tuned", out=tmp_path / "unseen")
    list(transfer_prompt(again))
    torch.testing.assert_close(read_soft_prompt(tmp_path / "unseen").vectors, projected.vectors)
    assert open_predictor(tmp_path / "unseen").classifier.classes == ("blue sky", "green sky", "red")


def test_distance_to_prompts_of_both_models(folder: Path, tmp_path: Path) -> None:
    pair = f"{folder / 'small'}={folder / 'bundled'}"
    list(transfer_prompt(config(folder, distance=(pair,), steps=150, learning_rate=0.01, out=tmp_path / "far")))
    projected, target = read_soft_prompt(tmp_path / "far").vectors, read_soft_prompt(folder / "bundled").vectors
    assert squared_distance(projected, target) < 1e-3 * squared_distance(torch.zeros_like(target), target)


def test_the_same_model_has_the_prompt_as_it_is(folder: Path, tmp_path: Path) -> None:
    options = {"file": folder / "bundled", "data": str(folder / "others")}
    lines = list(transfer_prompt(config(folder, **options, out=tmp_path / "same")))
    assert torch.equal(read_soft_prompt(tmp_path / "same").vectors, read_soft_prompt(folder / "bundled").vectors)
    assert not (tmp_path / "same/projector.safetensors").exists()
    assert any(line.startswith("train it further:") for line in lines)
    usual: dict[str, Any] = {"data": options["data"], "model": "bundled_clip", "method": "prompt_tuning", "options": TOKENS}
    further = TransferConfig(
        **usual, steps=1, learning_rate=1e-9, batch=8, workers=1, init_from=tmp_path / "same", out=tmp_path / "on"
    )
    transfer(further)
    torch.testing.assert_close(read_soft_prompt(tmp_path / "on").vectors, read_soft_prompt(folder / "bundled").vectors)


def test_projectors_and_pairs_of_other_models(folder: Path, tmp_path: Path) -> None:
    source, target = (read_soft_prompt(folder / name) for name in ("small", "bundled"))
    models = {"source": {**source.base, "fingerprint": "other"}, "target": target.base}
    path = PromptProjector(3, 16, 96, hidden=2).save(tmp_path, models)
    with raises(LoadError, file=path, where="source"):
        list(transfer_prompt(config(folder, projector=path, out=tmp_path / "a")))
    for pair, file in (((folder / "bundled", folder / "bundled"), "bundled"), ((folder / "small", folder / "small"), "small")):
        with raises(OptionError, option="distance", file=folder / file):
            list(transfer_prompt(config(folder, distance=(f"{pair[0]}={pair[1]}",), out=tmp_path / file)))


def test_options(folder: Path) -> None:
    for option, value, given in (
        ("to", "bundled", "bundled"),
        ("hidden", 0, 0),
        ("steps", 0, 0),
        ("epochs", -1, -1),
        ("batch", 0, 0),
        ("learning_rate", 0.0, 0.0),
        ("distance", ("runs/pets",), "runs/pets"),
        ("distance", ("=runs/pets",), "=runs/pets"),
    ):
        with raises(OptionError, option=option, given=given):
            config(folder, **{option: value})
    with raises(OptionError, option="projector", given="p"):
        config(folder, distance=("a=b",), projector=Path("p"))
