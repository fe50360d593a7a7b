"""Denoisers in GGUF files: loading, training of adapters, and files of other models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.base_models.quantized import dequantized
from tests.raising import raises
from veneer import base_models
from veneer.hub import connection as hub
from veneer.injection.errors import BaseModelError, OptionError, UnsupportedSite
from veneer.injection.quantized_weight import float_weight, is_quantized, quantization_of
from veneer.testing.pipelines import tiny_pipeline

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
BOUNDS = {"Q8_0": 0.01, "Q4_0": 0.1}
"""Type of the file to its largest relative error."""


def write(file: Path, model: Any, kind: str) -> Path:
    """Writes a model with its linear weights quantized, where the width allows it."""
    writer = gguf.GGUFWriter(str(file), "flux")
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if name in linear and array.shape[1] % 32 == 0:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a FLUX pipeline, and files of its transformer."""
    folder = tmp_path_factory.mktemp("gguf")
    pipe = tiny_pipeline("flux")
    pipe.save_pretrained(folder / "base")
    for kind in BOUNDS:
        write(folder / f"{kind}.gguf", pipe.transformer, kind)
    return folder


@pytest.mark.parametrize("kind", BOUNDS)
def test_adapters_train_as_on_the_dequantized_model(kind: str, made: Path) -> None:
    pipe = base_models.load(made / "base", quantize=made / f"{kind}.gguf")
    recipe = quantization_of(pipe.transformer)
    assert recipe is not None
    assert recipe["kind"] == kind.lower()
    original = tiny_pipeline("flux").transformer
    for name, module in pipe.transformer.named_modules():
        if is_quantized(module._parameters.get("weight")):
            weight = original.get_submodule(name).weight.detach()
            assert (float_weight(module) - weight).norm() < BOUNDS[kind] * weight.norm()
    found = []
    for model in (pipe.transformer, dequantized(base_models.load(made / "base", quantize=made / f"{kind}.gguf").transformer)):
        torch.manual_seed(0)
        attached = veneer.attach(model, "dora", rank=2, sample=True)
        with torch.no_grad():
            for p in attached.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        output = model(**_inputs(model), return_dict=False)[0]
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad for p in attached.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def _inputs(model: Any) -> dict[str, Any]:
    from veneer.hosts.diffusers_dit import DiffusersDiT

    return DiffusersDiT().sample(model)


def test_merging_is_rejected(made: Path) -> None:
    pipe = base_models.load(made / "base", quantize={"transformer": made / "Q8_0.gguf"})
    attached = veneer.attach(pipe, "lora")
    with raises(UnsupportedSite, given="quantized"):
        attached.merge(requantize=True)


def test_a_file_of_another_model(made: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.gguf", tiny_pipeline("flux", num_attention_heads=4).transformer, "Q8_0")
    with raises(BaseModelError, file=other, where="transformer"):
        base_models.load(made / "base", quantize=other)
    shorter = write(tmp_path / "shorter.gguf", tiny_pipeline("flux", num_single_layers=1).transformer, "Q8_0")
    with raises(BaseModelError, file=shorter, expected="FluxTransformer2DModel"):
        base_models.load(made / "base", quantize=shorter)
    with raises(BaseModelError, file=made / "Q8_0.gguf", where="unet"):
        base_models.load("bundled", quantize=made / "Q8_0.gguf")


def test_a_file_of_another_kind(made: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"text of some length")
    with raises(BaseModelError, where="kind", given=b"text", expected=b"GGUF"):
        base_models.load(made / "base", quantize=tmp_path / "text.gguf")
    with raises(BaseModelError, where="kind", given=".gguf", expected="quantize"):
        base_models.load(made / "Q8_0.gguf")
    with raises(OptionError, option="quantize", where="vae"):
        base_models.load(made / "base", quantize={"vae": made / "Q8_0.gguf"})


def test_an_unreachable_hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "unreachable", lambda: "the hub is unreachable")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, folder = "0" * 40, tmp_path / "models--owner--tiny"
    shutil.copytree(made / "base", folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    pipe = base_models.load("owner/tiny", quantize=made / "Q8_0.gguf")
    assert quantization_of(pipe.transformer) is not None
    with raises(BaseModelError, where="hub", given="owner/none") as caught:
        base_models.load("owner/none", quantize=made / "Q8_0.gguf")
    assert "the hub is unreachable" in str(caught.value)
    with raises(OptionError, option="quantize", where="vae"):
        base_models.load("owner/tiny", quantize={"vae": made / "Q8_0.gguf"})
