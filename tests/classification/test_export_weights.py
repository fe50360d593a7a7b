"""Every method on every vision host, exported to merged weights and opened by timm or open_clip alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from tests.classification.export_cases import (
    CLASSES,
    HOSTS,
    TrainedMethod,
    open_small,
    relative,
    run_open_clip,
    run_timm,
    trained,
    trained_methods,
)
from tests.raising import raises
from veneer.classification.data.transforms import EvalView
from veneer.classification.export.export_classifier import export_classifier
from veneer.classification.export.export_format import ExportError, ExportSource
from veneer.injection import OptionError, SaveError, attachments

MERGEABLE = {"lora", "dora", "loha", "lokr", "ssf", "ia3", "glora", "svdiff", "vera", "fact", "bitfit", "norm_tuning", "full"}
"""Methods that have a weight form on every host; more have one on some."""


def export(case: TrainedMethod, kind: str, out: Path) -> Tensor:
    """Logits of the exported weights."""
    clip = kind == "clip"
    export_classifier(case.source, "open_clip" if clip else "timm", out)
    return (run_open_clip if clip else run_timm)(out, case.pixels)


@pytest.mark.parametrize("host", [host for host in HOSTS if host != "transformers_vit"])
def test_every_method_is_exported_with_equal_logits_or_rejected(host: str, tmp_path: Path) -> None:
    exported, classifier = set(), open_small(HOSTS[host], tmp_path)
    for case in trained_methods(classifier):
        out = tmp_path / case.method
        if case.merges:
            logits = export(case, HOSTS[host], out)
            assert relative(float((logits - case.logits).abs().max()), case.logits) < 1e-5, case.method
            assert relative(case.change, case.logits) > 1e-3, case.method
            exported.add(case.method)
        else:
            with raises(ExportError, expected=("onnx", "torch-export")):
                export(case, HOSTS[host], out)
            assert not out.exists()
    assert exported >= MERGEABLE
    assert not list(tmp_path.glob(".saving*"))


def test_weights_of_a_model_of_transformers_are_rejected(tmp_path: Path) -> None:
    with trained(open_small("dinov2", tmp_path), "lora") as case:
        for to in ("timm", "open_clip"):
            with raises(ExportError, expected=("onnx", "torch-export")):
                export_classifier(case.source, to, tmp_path / "out")


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_the_model_is_unchanged_after_an_export(kind: str, tmp_path: Path) -> None:
    classifier = open_small(kind, tmp_path)
    with trained(classifier, "lora") as case:
        export(case, kind, tmp_path / "out")
        assert not any(a.merged for a in attachments(classifier.model))
        with torch.no_grad():
            assert torch.equal(classifier.model(case.pixels), case.logits)


def test_a_timm_folder_has_labels_and_preprocessing(tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import create_model

    classifier = open_small("resnet", tmp_path)
    view = EvalView({**classifier.data, "input_size": (3, 48, 48)}, squash=True)
    with trained(classifier, "lora"):
        export_classifier(ExportSource(classifier, view.config), "timm", tmp_path / "out")
    model: Any = create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    assert config["architecture"] == "resnet18"
    assert config["num_classes"] == model.num_classes == len(CLASSES)
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    assert torch.equal(transform(image), view(image))
    assert transform(image).shape == (3, 48, 48)


def test_an_open_clip_folder_has_preprocessing_a_tokenizer_and_labels(tmp_path: Path) -> None:
    import open_clip

    from veneer.classification.models.loading import open_classifier

    classifier = open_classifier("bundled_clip", CLASSES)
    view = EvalView(classifier.data, squash=True)
    export_classifier(ExportSource(classifier, view.config), "open_clip", tmp_path / "out")
    clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    assert torch.equal(transform(image), view(image))
    with safe_open(tmp_path / "out" / "class_embeddings.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label_names"]) == list(CLASSES)
        weight = file.get_tensor("weight")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")([f"a photo of a {name}." for name in CLASSES])
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(tokens, normalize=True), weight)


def test_a_size_and_arguments_of_the_architecture_are_exported(tmp_path: Path) -> None:
    from veneer.classification.models.loading import open_classifier

    open_small("vit", tmp_path)
    classifier = open_classifier(str(tmp_path / "vit"), CLASSES, size=64)
    with trained(classifier, "bitfit") as case:
        assert case.pixels.shape[-1] == 64
        assert torch.allclose(export(case, "vit", tmp_path / "out"), case.logits, atol=1e-5)


def test_arguments_are_exported_by_releases_of_timm_that_do_not_record_them(tmp_path: Path) -> None:
    classifier = open_small("convnext", tmp_path)
    classifier.model.__dict__.pop("_model_args", None)
    assert classifier.arguments["depths"] == [1, 1, 1, 1]
    with trained(classifier, "bitfit") as case:
        assert torch.allclose(export(case, "convnext", tmp_path / "out"), case.logits, atol=1e-5)


def test_exports_that_cannot_be_written_are_errors(tmp_path: Path) -> None:
    vit, clip = open_small("vit", tmp_path), open_small("clip", tmp_path)
    with trained(vit, "lora") as case:
        for to, error, data in (
            ("open_clip", ExportError, {"where": "open_clip", "expected": ("timm", "onnx", "torch-export")}),
            ("onnx", OptionError, {"option": "out", "expected": ".onnx"}),
            ("torch-export", OptionError, {"option": "out", "expected": ".pt2"}),
        ):
            with raises(error, **data):
                export_classifier(case.source, to, tmp_path / "out")
        with raises(OptionError, option="include_normalization", expected=("onnx", "torch-export")):
            export_classifier(ExportSource(vit, case.source.data, True), "timm", tmp_path / "out")
        (tmp_path / "out").mkdir()
        with raises(SaveError, file=tmp_path / "out", given="exists"):
            export_classifier(case.source, "timm", tmp_path / "out")
    with raises(ExportError, where="timm", expected=("onnx", "torch-export", "open_clip")):
        export_classifier(ExportSource(clip, EvalView(clip.data).config), "timm", tmp_path / "other")


def test_different_logits_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    """The forward pass of the trained model has a hook that weights do not contain."""
    classifier = open_small("vit", tmp_path)
    with trained(classifier, "lora") as case:
        handle = classifier.model.register_forward_hook(lambda module, args, logits: logits * 1.001)
        try:
            with pytest.raises(ExportError) as caught:
                export_classifier(case.source, "timm", tmp_path / "out")
        finally:
            handle.remove()
    assert caught.value.given > caught.value.expected > 0
    assert {path.name for path in tmp_path.iterdir()} == {"vit"}
