"""`veneer transfer --unlabeled`: runs of PET and PPT on images with and without labels, and which options it needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.data.transforms import TrainView
from veneer.classification.data.unlabeled import UnlabeledImages, read_unlabeled
from veneer.classification.predict import open_predictor
from veneer.injection import OptionError, VeneerError
from veneer.training.loop.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("unlabeled")
    image_folder(parent / "labeled", count=6)
    image_folder(parent / "more", count=3, seed=1)
    return parent


def config(folder: Path, **options: Any) -> TransferConfig:
    usual: dict[str, Any] = {
        "data": str(folder / "labeled"), "model": "bundled_clip", "method": "pet", "unlabeled": folder / "more", "steps": 6,
        "batch": 4, "augment": "none", "workers": 1, "test": 0.25, "options": {"pet": {"patterns": ("{}", "a {}.")}},
    }  # fmt: skip
    return TransferConfig(**{**usual, **options})


def test_a_run_saves_the_distilled_model(folder: Path, tmp_path: Path) -> None:
    out = transfer(config(folder, out=tmp_path / "run"))
    with safe_open(out / "adapter.safetensors", "pt") as file:
        (entry,) = json.loads(file.metadata()["veneer"])["attachments"]
    tensors = load_file(out / "adapter.safetensors")
    assert entry["config"]["distilled"]
    assert {tensor.shape[0] for tensor in tensors.values()} == {1}
    assert sum(bool(tensor.any()) for tensor in tensors.values()) > len(tensors) / 2
    assert json.loads((out / "result.json").read_text())["chosen"]["step"] >= 4
    predictor = open_predictor(out)
    assert torch.isfinite(predictor.logits(torch.zeros(1, 3, *predictor.classifier.data["input_size"][1:]))).all()


def test_a_run_with_generations(folder: Path, tmp_path: Path) -> None:
    """The first generation is that of a run without; the second one trains on further images, from zero deltas."""
    losses = {}
    for generations in (1, 2):
        options = {"pet": {"patterns": ("{}", "a {}."), "generations": generations, "labeled_share": 0.7}}
        out = transfer(config(folder, options=options, steps=12, out=tmp_path / str(generations)))
        losses[generations] = json.loads((out / "result.json").read_text())["epochs"]
        assert not (out / "pseudo_labels.json").exists()
    (entry,) = json.loads(safe_open(out / "adapter.safetensors", "pt").metadata()["veneer"])["attachments"]
    assert entry["config"]["distilled"]
    one, two = (losses[generations] for generations in (1, 2))
    assert len(one) == len(two) >= 3
    assert one[0] == two[0]
    assert one[-1]["val_loss"] != two[-1]["val_loss"]
    short = {"pet": {"patterns": ("{}", "a {}."), "generations": 3}}
    with raises(OptionError, method="pet", option="generations", given=3, expected=6):
        transfer(config(folder, options=short, steps=6, out=tmp_path / "short"))


def test_a_run_that_stops_in_a_generation_resumes_bitwise(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of the second generation, from step 4 on, are those of models that the resumed run no longer has."""
    options = {"pet": {"patterns": ("{}", "a {}."), "generations": 2, "labeled_share": 0.7}}
    whole = config(folder, options=options, steps=12, out=tmp_path / "whole")
    transfer(whole)
    half, report = dataclasses.replace(whole, out=tmp_path / "half"), Trainer._report

    def stop_at_six(self: Trainer, *rest: Any) -> None:
        report(self, *rest)
        if self.step == 6:
            self.stop()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_report", stop_at_six)
        transfer(half)
    assert (tmp_path / "half/pseudo_labels.json").exists()
    assert not (tmp_path / "half/result.json").exists()
    transfer(dataclasses.replace(half, resume=True))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "half")]
    assert results[0]["epochs"] == results[1]["epochs"]
    assert results[1]["training"]["resumed_from"] > 4
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_with_pretrained_prompts(folder: Path, tmp_path: Path) -> None:
    """Random crops of images, not their cached features, and an epoch chosen among those with labels."""
    options = {"ppt": {"tokens": 3, "confidence": 0.0}}
    out = transfer(config(folder, method="ppt", options=options, steps=4, augment="light", out=tmp_path / "run"))
    (vectors,) = load_file(out / "adapter.safetensors").values()
    assert vectors.shape[0] == 3
    result = json.loads((out / "result.json").read_text())
    assert result["chosen"]["step"] >= 3
    assert not result["training"]["cached_features"]


def test_options(folder: Path, tmp_path: Path) -> None:
    for options, option, given in (
        ({"unlabeled": None}, "unlabeled", None),
        ({"method": "lora", "options": {}}, "unlabeled", str(folder / "more")),
    ):
        with raises(OptionError, option=option, given=given):
            config(folder, **options, out=tmp_path / "run").with_defaults()
    with raises(VeneerError, file=tmp_path / "none"):
        read_unlabeled(tmp_path / "none")


def test_each_step_reads_further_images(folder: Path) -> None:
    """Every image once before the first is repeated, and the same ones for the same step."""
    source = read_unlabeled(folder / "more")
    assert len(source) == 9

    class Index:
        side = None

        def __call__(self, image: Any, epoch: int, index: int) -> torch.Tensor:
            return torch.full((3, 1, 1), float(index))

    images = UnlabeledImages(source, Index(), seed=0, threads=1)
    steps = [images(step, [0, 1, 2], 3)[:, 0, 0, 0].tolist() for step in range(3)]
    assert sorted(index for step in steps for index in step) == [*range(9)]
    assert images(1, [2], 3)[:, 0, 0, 0].tolist() == steps[1][2:]
    images.close()


def test_views_are_crops_of_the_same_images(folder: Path) -> None:
    """Two views differ, each is the same for the same step, and the first is the default."""
    source = read_unlabeled(folder / "more")
    images = UnlabeledImages(source, TrainView({"input_size": (3, 8, 8)}, "light", seed=0), seed=0, threads=1)
    first, second = (images(2, [0, 1, 2], 3, view) for view in (0, 1))
    assert first.shape == second.shape == (3, 3, 8, 8)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(images(2, [0, 1, 2], 3), first)
    assert torch.equal(images(2, [1], 3, 1), second[1:2])
    images.close()
