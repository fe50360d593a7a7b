"""Classifiers on vision models of transformers: weights, features, preprocessing and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from veneer.pipelines.compare import CompareConfig, compare

from tests.classification.small import image_folder
from tests.classification.transformers_folders import transformers_folder
from tests.raising import raises
from veneer.classification.data.transforms import EvalView
from veneer.classification.models.classifier import ModelError, digest_of
from veneer.classification.models.image_processors import data_config
from veneer.classification.models.loading import build_without_weights, check_name, new_head, open_classifier
from veneer.classification.models.transformers_loading import KEPT_HEADS, TYPES
from veneer.hosts._transformers_vision import records
from veneer.injection import sites
from veneer.injection.sites import PixelSite, StreamSite
from veneer.models.image_classifier import POOLINGS

CLASSES = ["red", "green", "blue"]
KINDS = ("dinov2", "siglip", "siglip_tower", "clip", "clip_tower", "vit", "beit")


def expected_features(kind: str, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """The features of transformers' own model."""
    model: Any = transformers.AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    with torch.no_grad():
        output = (model.vision_model if kind in ("siglip", "clip") else model)(pixels)
    if kind == "dinov2":
        return torch.cat([output.last_hidden_state[:, 0], output.last_hidden_state[:, 1:].mean(1)], 1)
    return output.last_hidden_state[:, 0] if kind == "vit" else output.pooler_output


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = transformers_folder(tmp_path, kind)
    classifier, pixels = open_classifier(f"hf:{folder}", CLASSES, seed=1), torch.randn(2, 3, 32, 32)
    model: Any = classifier.model
    features = expected_features(kind, folder, pixels)
    torch.testing.assert_close(model.features(pixels), features)
    torch.testing.assert_close(model(pixels), features @ model.head.weight.T + model.head.bias)
    assert classifier.fresh
    assert classifier.weights == digest_of(folder / "model.safetensors")
    assert classifier.features is not None
    assert classifier.features.width == features.shape[1]
    assert not any(p.requires_grad for p in model.parameters())
    other = open_classifier(f"hf:{folder}", CLASSES, seed=2).model.get_parameter("head.weight")
    assert not torch.equal(other, model.head.weight), "another seed, another head"
    assert len(sites(build_without_weights(f"hf:{folder}"))) > 50


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "clip", "beit"])
def test_preprocessing_is_that_of_the_image_processor(tmp_path: Path, kind: str) -> None:
    """Up to the rounding of pixels, because transformers resizes tensors and timm images."""
    folder = transformers_folder(tmp_path, kind)
    pixels = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC)
    classifier = open_classifier(f"hf:{folder}", CLASSES)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    difference = (EvalView(classifier.data)(image) - expected).abs() * std * 255
    assert difference.max() < 1.5
    assert difference.mean() < 0.3
    pixel_site = next(site for site in sites(classifier.model) if isinstance(site, PixelSite))
    assert (pixel_site.mean, pixel_site.std) == (classifier.data["mean"], classifier.data["std"])


def test_rescaling_is_part_of_the_normalization() -> None:
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8}, rescale_factor=1 / 127.5, image_mean=[1.0] * 3)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    expected = processor(pixels, return_tensors="pt")["pixel_values"][0]
    view = EvalView(data_config(processor, "hf:x"))
    torch.testing.assert_close(view(Image.fromarray(pixels)), expected)


def test_resized_sides_survive_timms_rounding() -> None:
    for resized in range(225, 520):
        config = data_config(
            transformers.CLIPImageProcessor(size={"shortest_edge": resized}, crop_size={"height": 224, "width": 224}), "hf:x"
        )
        assert int(224 / config["crop_pct"]) == resized


@pytest.mark.parametrize("kind", ["vit", "beit", "registers"])
def test_a_kept_head_gives_the_logits_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = transformers_folder(tmp_path, kind)
    classifier = open_classifier(f"hf:{folder}", CLASSES, keep_head=True)
    model: Any = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(classifier.model(pixels), model(pixels).logits)
    assert not classifier.fresh


def test_random_weights_and_another_size(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path, "vit")
    name = "backbone.layers.0.attention.q_proj.weight"
    first, again, other = (
        open_classifier(f"hf:{folder}", CLASSES, weights="none", seed=s).model.get_parameter(name) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert open_classifier(f"hf:{folder}", CLASSES, weights="none").weights == "random"
    large = open_classifier(f"hf:{folder}", CLASSES, size=48)
    assert large.data["input_size"] == (3, 48, 48)
    assert large.model(torch.zeros(1, 3, 48, 48)).shape == (1, 3)
    assert {site.grid for site in sites(large.model) if isinstance(site, StreamSite)} == {(6, 6)}
    with raises(ModelError, where="size", given=(44, 44), expected=8):
        open_classifier(f"hf:{folder}", CLASSES, size=44)


def test_errors_of_folders(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path, "vit")
    for check in (check_name, lambda name: open_classifier(name, CLASSES)):
        with raises(ModelError, where="folder", given=str(tmp_path / "none")):
            check(f"hf:{tmp_path / 'none'}")
        with raises(ModelError, where="config.json", given="missing"):
            check(f"hf:{tmp_path}")
        with raises(ModelError, where="model_type", given="bert", expected=TYPES):
            check(f"hf:{transformers_folder(tmp_path, 'bert')}")
    check_name(f"hf:{folder}")
    processor = folder / "preprocessor_config.json"
    processor.rename(tmp_path / "kept.json")
    for check in (check_name, lambda name: open_classifier(name, CLASSES)):
        with raises(ModelError, where="preprocessor_config.json", given="missing"):
            check(f"hf:{folder}")
    (tmp_path / "kept.json").rename(processor)
    with raises(ModelError, where="model_type", given="siglip2_vision_model"):
        open_classifier(f"hf:{transformers_folder(tmp_path, 'siglip2')}", CLASSES)


def test_errors_of_weights(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path, "vit")
    with raises(ModelError, where="weights", given="x.safetensors", expected=("none",)):
        open_classifier(f"hf:{folder}", CLASSES, weights="x.safetensors")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("vit.layernorm.bias"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with raises(ModelError, where="weights", expected="ViTModel"):
        open_classifier(f"hf:{folder}", CLASSES)
    file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with raises(ModelError, where="weights", given="unreadable", expected=".safetensors"):
        open_classifier(f"hf:{folder}", CLASSES)
    siglip = transformers_folder(tmp_path, "siglip")
    with raises(ModelError, where="head", given="siglip", expected=KEPT_HEADS):
        open_classifier(f"hf:{siglip}", CLASSES, keep_head=True)
    with raises(ModelError, where="head", given="none"):
        open_classifier(f"hf:{siglip}", CLASSES, keep_head=True, weights="none")


def test_a_hub_name_without_a_connection_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.hub.connection.unreachable", lambda: "offline")
    check_name("hf:user/none")
    for name in ("hf:user/none", "hf:user/none@v2"):
        with raises(ModelError, where="hub", given=name):
            open_classifier(name, CLASSES)


def test_an_image_processor_without_a_fixed_size_is_an_error(tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path, "dinov2")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_center_crop": False}))
    with raises(ModelError, where="preprocessor_config.json", expected=("height", "width")):
        open_classifier(f"hf:{folder}", CLASSES)


def test_model_types_are_those_of_the_records() -> None:
    """Towers of their own type also in a model with text, whose config names the type of both."""
    towers = {
        getattr(transformers, record.classes[0]).config_class.model_type for record in records().values() if record.takes_images
    }
    assert {*TYPES} == towers | {"clip", "siglip"}
    assert {*POOLINGS} <= towers
    assert {*KEPT_HEADS} <= towers


def test_rows_of_a_comparison_share_a_model_of_transformers(tmp_path: Path) -> None:
    """With a new head for each seed, the one that `open_classifier` initializes with this seed."""
    images, folder = image_folder(tmp_path / "images", count=10), transformers_folder(tmp_path, "dinov2")
    options: dict[str, Any] = {"model": f"hf:{folder}", "epochs": 1, "batch": 8, "workers": 1, "augment": "none"}
    compare(CompareConfig(data=str(images), methods="bitfit", seeds=2, out=tmp_path / "out", **options))
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [(run["row"], run["seed"]) for run in runs] == [
        ("linear_probe", 0), ("bitfit", 0), ("linear_probe", 1), ("bitfit", 1),
    ]  # fmt: skip
    first, second = (open_classifier(f"hf:{folder}", CLASSES, seed=seed) for seed in (0, 1))
    new_head(first.model, "dinov2", len(CLASSES), 1)
    assert torch.equal(first.model.head.weight, second.model.head.weight)
