"""Classifiers exported as graphs: ONNX in onnxruntime, and torch.export; the full product is in `export_table`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.classification.export_cases import CLASSES, HOSTS, open_small, relative, run_onnx, trained
from tests.raising import raises
from veneer.classification.export.export_classifier import export_classifier
from veneer.classification.export.export_format import ExportError
from veneer.classification.models.classifier import Classifier
from veneer.classification.models.loading import open_classifier
from veneer.injection import VeneerError, attachments

METHODS = {
    "timm_swin": "dora", "timm_convnext": "ssf", "timm_conv": "loha", "timm_fallback": "lora", "clip_classifier": "bitfit",
    "transformers_vit": "ia3",
}  # fmt: skip
"""A mergeable method for each host."""
UNMERGED = [("convnext", "adaptformer"), ("dinov2", "adaptformer"), ("clip", "cocoop"), ("resnet", "tip_adapter")]
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def run(to: str, file: Path, pixels: Tensor) -> Tensor:
    """Logits without veneer."""
    if to == "onnx":
        return run_onnx(file, pixels)
    with torch.no_grad():
        logits: Tensor = torch.export.load(file).module()(pixels)
    return logits


def check(classifier: Classifier, method: str, to: str, folder: Path) -> Path:
    """Exports, and compares the logits of one, two and five images."""
    with trained(classifier, method) as case:
        file = folder / f"{method}{SUFFIXES[to]}"
        report = export_classifier(case.source, to, file)
        assert relative(report.difference, case.logits) < 1e-4
        assert relative(case.change, case.logits) > 1e-3
        more = torch.cat([case.pixels, case.pixels.flip(-1), case.pixels[:1].flip(-2)])
        with torch.no_grad():
            for pixels in (case.pixels[:1], case.pixels, more):
                expected = classifier.model(pixels)
                assert relative(float((run(to, file, pixels) - expected).abs().max()), expected) < 1e-4
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    """A ViT with LoRA in both formats."""
    classifier = open_small("vit", folder)
    return {to: check(classifier, "lora", to, folder) for to in SUFFIXES}


@pytest.mark.parametrize("host", sorted({*HOSTS} - {"timm_vit"}))  # which the other tests export
def test_onnx_equals_the_merged_model(host: str, tmp_path: Path) -> None:
    check(open_small(HOSTS[host], tmp_path), METHODS[host], "onnx", tmp_path)


@pytest.mark.parametrize(("kind", "method"), UNMERGED)
def test_methods_that_cannot_be_merged_are_in_the_graph(kind: str, method: str, tmp_path: Path) -> None:
    check(open_small(kind, tmp_path), method, "torch-export", tmp_path)


def test_onnx_contains_adapters_that_cannot_be_merged(tmp_path: Path) -> None:
    check(open_small("vit", tmp_path), "vpt", "onnx", tmp_path)


def test_merged_adapters_and_the_text_tower_are_not_in_the_graph(tmp_path: Path) -> None:
    classifier = open_small("clip", tmp_path)
    before = {name: id(tensor) for name, tensor in classifier.model.state_dict(keep_vars=True).items()}
    file = check(classifier, "lora", "torch-export", tmp_path)
    names = set(torch.export.load(file).state_dict)
    assert {name.removeprefix("model.clip.").partition(".")[0] for name in names} == {"visual", "logit_scale", "model"}
    assert {name for name in names if not name.startswith("model.clip.")} == {"model.head.texts.weight"}
    assert {n: id(t) for n, t in classifier.model.state_dict(keep_vars=True).items()} == before
    assert classifier.model.head.texts.names == CLASSES  # type: ignore[union-attr]


def test_files_have_labels_and_preprocessing(files: dict[str, Path], folder: Path) -> None:
    import onnx

    for to, file in files.items():
        beside = json.loads(file.with_name(f"{file.name}.json").read_text())
        if to == "onnx":
            model = onnx.load(file)
            inside = {entry.key: entry.value for entry in model.metadata_props}["veneer"]
            shape = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
            assert shape == ["batch", 3, 32, 32]
        else:
            archive = {"veneer.json": ""}
            torch.export.load(file, extra_files=archive)
            inside = archive["veneer.json"]
        assert json.loads(inside) == beside
        assert beside["label_names"] == list(CLASSES)
        assert beside["methods"] == ["lora", "linear_probe"]
        assert beside["preprocessing"] == {
            "input_size": [3, 32, 32], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
            "mean": [0.5] * 3, "std": [0.5] * 3,
        }  # fmt: skip
        assert str(folder) not in inside


def test_a_graph_can_normalize(tmp_path: Path) -> None:
    classifier = open_small("resnet", tmp_path)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.6)
    with trained(classifier, "lora") as case:
        source = dataclasses.replace(case.source, data={**case.source.data, "mean": mean, "std": std}, include_normalization=True)
        file = tmp_path / "model.pt2"
        export_classifier(source, "torch-export", file)
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            expected = classifier.model((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        assert relative(float((run("torch-export", file, pixels) - expected).abs().max()), expected) < 1e-4
    assert json.loads(file.with_name(f"{file.name}.json").read_text())["includes_normalization"] is True


def test_a_model_that_torch_cannot_export_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    classifier = open_small("vit", tmp_path)

    def branch(module: Any, args: Any, logits: Tensor) -> Tensor:
        return logits if float(logits.sum()) > 0 else -logits

    with trained(classifier, "lora") as case:
        handle = classifier.model.register_forward_hook(branch)
        try:
            for to, suffix in SUFFIXES.items():
                with raises(ExportError, where=to):
                    export_classifier(case.source, to, tmp_path / f"out{suffix}")
        finally:
            handle.remove()
        assert not any(a.merged for a in attachments(classifier.model))
    assert {path.name for path in tmp_path.iterdir()} == {"vit"}


def test_the_image_encoder_of_timm_in_a_clip_is_exported(tmp_path: Path) -> None:
    """CustomTextCLIP, whose text tower is one module."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "test_resnet", "image_size": 32, "timm_pool": "avg", "timm_proj": "linear",
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    }  # fmt: skip
    (tmp_path / "export_test_timm_clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "export_test_timm_clip.json")
    classifier = open_classifier("open_clip:export_test_timm_clip", CLASSES, weights="none")
    file = check(classifier, "lora", "torch-export", tmp_path)
    assert not [name for name in torch.export.load(file).state_dict if ".text." in name]


def test_export_errors_are_errors_of_the_package() -> None:
    assert issubclass(ExportError, VeneerError)
