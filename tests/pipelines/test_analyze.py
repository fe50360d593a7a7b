"""`veneer analyze heads` on a small classifier and on the bundled diffusion model: measurements, files and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from veneer.pipelines.analyze import AnalyzeHeadsConfig, analyze_heads
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder, model_folder
from tests.classification.test_multi_label import color_table
from tests.pipelines.blank_plots import rendered_plots
from tests.raising import raises
from veneer.attention_heads import disabled_heads
from veneer.classification.config import TransferConfig
from veneer.classification.predict import open_predictor
from veneer.injection import OptionError
from veneer.training.data.image_io import DataError

SETTINGS: dict[str, Any] = {"method": "linear_probe", "epochs": 3, "batch": 8, "augment": "none", "workers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a model, and the run of a classifier."""
    parent = tmp_path_factory.mktemp("analyze")
    images, model = image_folder(parent / "images", count=8), model_folder(parent, "vit")
    transfer(TransferConfig(data=str(images), model=str(model), out=parent / "run", **SETTINGS))
    return parent


def test_every_head_of_a_classifier_on_the_validation_images(folder: Path, tmp_path: Path) -> None:
    """Against the predictions of the run for the same files, one by one."""
    data, out = str(folder / "images"), tmp_path / "heads"
    with rendered_plots():
        text = list(analyze_heads(AnalyzeHeadsConfig(str(folder / "run"), data, batch=2, out=out)))
    record = json.loads((out / "heads.json").read_text())
    assert [(head["layer"], head["head"]) for head in record["heads"]] == [
        (f"blocks.{d}.attn.proj", h) for d in (0, 1) for h in (0, 1)
    ]
    assert {file.name for file in out.iterdir()} == {"heads.json", "importance.png", "maps.png"}
    assert text[0].startswith("4 heads in 2 layers")
    predictor = open_predictor(folder / "run", torch.device("cpu"))
    rows = json.loads((folder / "run" / "splits.json").read_text())["validation"]
    files = [folder / "images" / name for name, *_ in rows]
    pixels = [predictor.view(Image.open(file).convert("RGB")) for file in files]
    labels = torch.tensor([predictor.classifier.classes.index(file.parent.name) for file in files])

    def measured() -> tuple[float, float]:
        logits = torch.cat([predictor.logits(each[None]) for each in pixels]).float()
        return float((logits.argmax(1) == labels).double().mean()), float(torch.nn.functional.cross_entropy(logits, labels))

    whole = measured()
    assert (record["measurements"]["accuracy"], record["measurements"]["loss"]) == pytest.approx(whole, rel=1e-4)
    for head in record["heads"]:
        for how, change in head["changes"].items():
            with disabled_heads(predictor.classifier.model, {head["layer"]: (head["head"],)}, how):
                accuracy, loss = measured()
            assert change["loss"] == pytest.approx(loss - whole[1], abs=1e-4)
            assert change["accuracy"] == pytest.approx(accuracy - whole[0], abs=1e-6)
    assert any(abs(head["changes"]["zero"]["loss"]) > 1e-3 for head in record["heads"])


def test_options_of_the_other_kind_of_model_are_errors(folder: Path, tmp_path: Path) -> None:
    run, data = str(folder / "run"), str(folder / "images")
    with raises(OptionError, option="data", given=None):
        list(analyze_heads(AnalyzeHeadsConfig(run, out=tmp_path / "out")))
    with raises(OptionError, option="prompts", given=("a toy",)):
        list(analyze_heads(AnalyzeHeadsConfig(run, data, prompts=("a toy",), out=tmp_path / "out")))
    with raises(OptionError, option="data", given=data):
        list(analyze_heads(AnalyzeHeadsConfig("bundled", data, out=tmp_path / "out")))
    image_folder(tmp_path / "other", count=1)
    (tmp_path / "other" / "red").rename(tmp_path / "other" / "crimson")
    with raises(DataError, where="classes"):
        list(analyze_heads(AnalyzeHeadsConfig(run, str(tmp_path / "other"), out=tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_classifier_of_several_labels_is_an_error(folder: Path, tmp_path: Path) -> None:
    table = color_table(tmp_path / "table", count=30)
    run = tmp_path / "run"
    transfer(TransferConfig(data=str(table), model=str(folder / "vit"), out=run, multi_label=True, **{**SETTINGS, "epochs": 1}))
    with raises(OptionError, option="model", given=str(run)):
        list(analyze_heads(AnalyzeHeadsConfig(str(run), str(table), out=tmp_path / "out")))


@pytest.mark.parametrize(("option", "value"), [("timesteps", 2), ("steps", 5), ("seed", 1)])
def test_options_of_diffusion_models_are_rejected_for_a_classifier(folder: Path, option: str, value: int) -> None:
    config = AnalyzeHeadsConfig(str(folder / "run"), str(folder / "images"), **{option: value})  # type: ignore[arg-type]
    with raises(OptionError, option=option, given=value):
        list(analyze_heads(config))


@pytest.mark.parametrize(("option", "value"), [("images", 8), ("batch", 2)])
def test_options_of_classifiers_are_rejected_for_a_diffusion_model(option: str, value: int) -> None:
    with raises(OptionError, option=option, given=value):
        list(analyze_heads(AnalyzeHeadsConfig("bundled", **{option: value})))  # type: ignore[arg-type]
