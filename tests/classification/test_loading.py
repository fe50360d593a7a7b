"""Opening of classifiers: heads, weights, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.classification.small import CLASSES, SIDE, model_folder
from tests.raising import raises
from veneer.classification.models.classifier import ModelError, check_weights, digest_of
from veneer.classification.models.loading import open_classifier


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_open_classifier_from_folder_with_new_head(tmp_path: Path, kind: str) -> None:
    folder = model_folder(tmp_path, kind)
    found = open_classifier(str(folder), CLASSES, seed=1)
    assert found.fresh
    assert found.data["input_size"] == (3, SIDE, SIDE)
    site = found.features
    assert site is not None
    state, file = found.model.state_dict(), load_file(folder / "model.safetensors")
    kept = [name for name in file if not name.startswith(f"{site.head}.")]
    assert all(torch.equal(state[name], file[name]) for name in kept)
    assert state[f"{site.head}.weight"].shape == (3, site.width)
    assert not any(p.requires_grad for p in found.model.parameters())
    assert not found.model.training
    again, other = (open_classifier(str(folder), CLASSES, seed=s).model.state_dict()[f"{site.head}.weight"] for s in (1, 2))
    assert torch.equal(again, state[f"{site.head}.weight"])
    assert not torch.equal(other, again), "another seed, another head"


def test_keep_head(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "vit")
    found = open_classifier(str(folder), CLASSES, keep_head=True)
    assert not found.fresh
    assert torch.equal(found.model.state_dict()["head.weight"], load_file(folder / "model.safetensors")["head.weight"])


def test_weights_from_file_and_random_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "vit")
    other = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    file = tmp_path / "other.safetensors"
    save_file(other, file)
    found = open_classifier(str(folder), CLASSES, weights=file)
    assert torch.equal(found.model.state_dict()["norm.weight"], other["norm.weight"])
    assert found.weights == digest_of(file)
    random = [open_classifier(str(folder), CLASSES, weights="none", seed=s) for s in (0, 0, 1)]
    a, b, c = (r.model.state_dict()["blocks.0.attn.qkv.weight"] for r in random)
    assert random[0].weights == "random"
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_errors_of_unknown_models_and_invalid_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "vit")
    with raises(ModelError, where="timm", given="vit_tiny_patch16_22") as caught:
        open_classifier("vit_tiny_patch16_22", CLASSES)
    assert "vit_tiny_patch16_224" in caught.value.expected
    with raises(ModelError, file=tmp_path / "missing.safetensors", given="missing"):
        open_classifier(str(folder), CLASSES, weights=tmp_path / "missing.safetensors")
    pickled = tmp_path / "weights.pth"
    torch.save({}, pickled)
    with raises(ModelError, file=pickled, where="suffix", given=".pth", expected=".safetensors"):
        open_classifier(str(folder), CLASSES, weights=pickled)
    resnet = model_folder(tmp_path, "resnet") / "model.safetensors"
    with raises(ModelError, file=resnet, given="mismatch"):
        open_classifier(str(folder), CLASSES, weights=resnet)


def test_input_size_option(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "vit")
    found = open_classifier(str(folder), CLASSES, size=48)
    assert found.data["input_size"] == (3, 48, 48)
    assert found.model(torch.zeros(1, 3, 48, 48)).shape == (1, 3)


def test_invalid_safetensors_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_text("nonsense")
    with raises(ModelError, file=file, given="damaged"):
        check_weights(file)
