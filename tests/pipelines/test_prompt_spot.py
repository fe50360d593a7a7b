"""`veneer prompts spot`: ranks of a library, the initial prompt, and a run that starts from it with other classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer.pipelines.prompts import SpotConfig, spot
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.injection import LoadError, OptionError
from veneer.prompt_transfer import StoredPromptError, average_similarity, read_library, read_prompts, write_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of three runs of VPT on a ViT, with another head than that of the task, which has two classes."""
    parent = tmp_path_factory.mktemp("spot")
    images, model = image_folder(parent / "images", count=6), model_folder(parent, "vit")
    task = image_folder(parent / "task", count=8, seed=1)
    (task / "red").rename(parent / "red")
    for seed in range(3):
        run: dict[str, Any] = {"data": str(images), "model": str(model), "method": "vpt", "steps": 2, "batch": 4, "workers": 1}
        transfer(TransferConfig(**run, seed=seed, out=parent / f"library-{seed}"))
    transfer(TransferConfig(**run, seed=3, learning_rate=0.05, init_from=parent / "library-0", out=parent / "near"))
    (first,) = read_library([parent / "library-0"])
    (parent / "negative").mkdir()
    write_prompt(parent / "negative", first, {name: -tensor for name, tensor in first.state.items()}, {})
    return parent


def config(folder: Path, **options: Any) -> SpotConfig:
    usual: dict[str, Any] = {
        "files": tuple(folder / f"library-{seed}" for seed in (2, 0, 1)), "data": str(folder / "task"),
        "model": str(folder / "vit"), "steps": 2, "batch": 4, "workers": 1,
    }  # fmt: skip
    return SpotConfig(**{**usual, **options})


def test_the_most_similar_prompt(folder: Path, tmp_path: Path) -> None:
    """The library's prompt that began at the values of the task's."""
    out = tmp_path / "spot"
    lines = list(spot(config(folder, out=out)))
    assert lines[0].startswith(f"{folder / 'library-0'}: ")
    record = json.loads((out / "result.json").read_text())
    assert record["chosen"] == [str(folder / "library-0")]
    task = read_prompts(out / "task")
    for seed in range(3):
        path = folder / f"library-{seed}"
        assert record["similarity"][str(path)] == pytest.approx(average_similarity(read_prompts(path), task), abs=1e-6)
    wanted = read_prompts(folder / "library-0")
    assert all(torch.equal(prompt, wanted[site]) for site, prompt in read_prompts(out).items())
    run: dict[str, Any] = {"data": str(folder / "task"), "model": str(folder / "vit"), "method": "vpt", "batch": 4, "workers": 1}
    further = transfer(TransferConfig(**run, steps=1, learning_rate=1e-9, init_from=out, out=tmp_path / "on"))
    for site, prompt in read_prompts(further).items():
        torch.testing.assert_close(prompt, wanted[site])
    with raises(LoadError, where="method"):
        transfer(TransferConfig(**{**run, "method": "lora"}, steps=1, init_from=out, out=tmp_path / "lora"))


def test_the_average_of_several(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "spot"
    files = tuple(folder / name for name in ("library-1", "near", "negative", "library-0"))
    list(spot(config(folder, files=files, top=2, out=out)))
    record = json.loads((out / "result.json").read_text())
    assert record["chosen"] == [str(folder / "library-0"), str(folder / "near")]
    a, b = (record["similarity"][path] for path in record["chosen"])
    assert a > b > 0
    first, second = (read_prompts(path) for path in record["chosen"])
    for site, prompt in read_prompts(out).items():
        torch.testing.assert_close(prompt, (a * first[site] + b * second[site]) / (a + b))
        assert (first[site] - second[site]).abs().max() > 1e-3
    with raises(OptionError, option="top", given=2):
        list(spot(config(folder, files=(folder / "library-0", folder / "negative"), top=2, out=tmp_path / "negative")))


def test_options(folder: Path, tmp_path: Path) -> None:
    for option, value in (("steps", 0), ("batch", 0), ("top", 0), ("top", 4), ("files", ())):
        with raises(OptionError, option=option, given=value):
            config(folder, **{option: value})
    with raises(StoredPromptError, where="model"):
        list(spot(config(folder, model="vit_tiny_patch16_224", weights="none", out=tmp_path / "other")))
