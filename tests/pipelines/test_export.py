"""`veneer export` of runs of `veneer transfer`: the results predict as `veneer predict` does, in processes without veneer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from veneer.pipelines.export import ExportConfig, export
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.predict import open_predictor
from veneer.cli import main
from veneer.injection import OptionError, VeneerError
from veneer.injection.errors import MissingExtra

BY_TIMM = """
import json, sys
sys.modules["veneer"] = None
import timm, torch
from PIL import Image

folder, *images = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
pixels = torch.stack([transform(Image.open(image).convert("RGB")) for image in images])
with torch.no_grad():
    print(json.dumps(model(pixels).softmax(1).tolist()))
"""
BY_ONNXRUNTIME = """
import json, sys
sys.modules["veneer"] = sys.modules["torch"] = None
import numpy as np, onnxruntime
from PIL import Image

file, *images = sys.argv[1:]
session = onnxruntime.InferenceSession(file)
about = json.loads(session.get_modelmeta().custom_metadata_map["veneer"])
_, height, width = about["preprocessing"]["input_size"]
resized = [Image.open(image).convert("RGB").resize((width, height), Image.Resampling.BILINEAR) for image in images]
pixels = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) / 255 for image in resized])
logits = session.run(None, {"pixels": pixels})[0]
odds = np.exp(logits - logits.max(1, keepdims=True))
print(json.dumps((odds / odds.sum(1, keepdims=True)).tolist()))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), "vit")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path, model: Path) -> Path:
    return train(images, model, tmp_path_factory.mktemp("run") / "lora", "lora")


def train(images: Path, model: Path, out: Path, method: str) -> Path:
    config: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "batch": 8}
    return transfer(TransferConfig(data=str(images), model=str(model), method=method, out=out, **config))


def probabilities(code: str, result: Path, files: list[Path]) -> list[list[float]]:
    done = subprocess.run([sys.executable, "-c", code, str(result), *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[list[float]] = json.loads(done.stdout)
    return found


def compare(code: str, result: Path, run: Path, images: Path) -> None:
    """Every class of images by `veneer predict` and by code without veneer."""
    files = sorted(images.rglob("0.png"))
    predictor = open_predictor(run)
    for prediction, found in zip(predictor.predict(files), probabilities(code, result, files), strict=True):
        expected = {prediction.label: prediction.probability, **dict(prediction.others)}
        assert dict(zip(predictor.classifier.classes, found, strict=True)) == pytest.approx(expected, abs=1e-5)


def test_a_timm_folder_predicts_without_veneer(run: Path, images: Path, tmp_path: Path) -> None:
    lines = export(ExportConfig(run, "timm", tmp_path / "folder"))
    assert lines[0] == str(tmp_path / "folder")
    compare(BY_TIMM, tmp_path / "folder", run, images)


def test_an_onnx_file_predicts_without_veneer_and_torch(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "colors.onnx"
    assert main(["export", str(run), "--to", "onnx", "--out", str(file), "--include-normalization"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(file), f"{file}.json"]
    assert str(file) in printed[-1]
    compare(BY_ONNXRUNTIME, file, run, images)


def test_results_are_in_the_run_folder_by_default(run: Path) -> None:
    export(ExportConfig(run, "torch-export"))
    assert {"classifier.pt2", "classifier.pt2.json"} <= {path.name for path in run.iterdir()}
    assert open_predictor(run)


def test_a_run_with_a_method_that_cannot_be_merged(images: Path, model: Path, tmp_path: Path) -> None:
    from veneer.classification.export.export_format import ExportError

    run = train(images, model, tmp_path / "run", "lora+adaptformer")
    with raises(ExportError, where="timm", expected=("onnx", "torch-export")) as caught:
        export(ExportConfig(run, "timm"))
    assert "branch" in caught.value.given
    export(ExportConfig(run, "torch-export", tmp_path / "out.pt2"))
    assert not (run / "timm").exists()


def test_the_end_of_a_run_names_the_next_commands(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(images, model, tmp_path / "run", "linear_probe")
    printed = capsys.readouterr().out.splitlines()
    commands = [line.partition(": ")[2].split() for line in printed[-2:]]
    assert [words[1:3] for words in commands] == [["predict", str(out)], ["export", str(out)]]
    export(ExportConfig(out, commands[1][-1]))  # type: ignore[arg-type]


def test_invalid_options(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(OptionError, option="to", expected=("timm", "onnx", "torch-export", "open_clip")):
        export(ExportConfig(run))
    with raises(VeneerError, file=tmp_path, where="model.json", given="missing"):
        export(ExportConfig(tmp_path, "timm"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with raises(MissingExtra, library="onnxscript", extra="export"):
        export(ExportConfig(run, "onnx"))
    assert not (run / "classifier.onnx").exists()
