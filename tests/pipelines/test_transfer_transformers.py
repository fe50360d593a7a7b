"""`veneer transfer` and `veneer predict` on vision models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder
from tests.classification.transformers_folders import transformers_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.predict import open_predictor
from veneer.injection import VeneerError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), count=16)


def run(images: Path, folder: Path, out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A run of a few steps, and its result."""
    defaults: dict[str, Any] = {"epochs": 8, "batch": 8, "augment": "none", "workers": 1, "test": 0.25, "learning_rate": 2e-2}
    transfer(TransferConfig(data=str(images), model=f"hf:{folder}", out=out, **{**defaults, **options}))
    return out, json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(("kind", "method"), [("dinov2", "vpt"), ("siglip", "lora")])
def test_a_run_trains_and_predicts(tmp_path: Path, images: Path, kind: str, method: str) -> None:
    folder = transformers_folder(tmp_path, kind)
    out, result = run(images, folder, tmp_path / "run", method=method)
    assert result["test_accuracy"] > 0.6, "three colors"
    assert result["model"]["name"] == f"hf:{folder}"
    file = next((images / "red").iterdir())
    lines = list(predict(PredictConfig(folder=out, images=(file,))))
    assert "red" in str(lines)
    predictor = open_predictor(out)
    with Image.open(file) as image:
        pixels = predictor.view(image.convert("RGB"))[None]
    probabilities = predictor.logits(pixels).softmax(1)
    assert predictor.classifier.classes[int(probabilities.argmax())] == "red"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0A")
    with raises(VeneerError, where="weights", file=f"hf:{folder}"):
        open_predictor(out)


def test_a_linear_probe_computes_each_image_once(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.models.image_classifier import ImageClassifier

    seen: list[int] = []
    features = ImageClassifier.features

    def counted(self: ImageClassifier, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(ImageClassifier, "features", counted)
    _, result = run(images, transformers_folder(tmp_path, "dinov2"), tmp_path / "run", method="linear_probe", lp_ft=True)
    assert result["training"]["cached_features"]
    assert sum(seen) == sum(result["data"]["pictures"].values())
    assert result["test_accuracy"] > 0.9
