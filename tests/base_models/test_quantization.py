"""Quantized base models: error bounds, which layers, options, and base models or machines that cannot be quantized."""

from __future__ import annotations

import gc
import importlib.util
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import veneer
from tests.base_models.quantized import EXACT, dit, host_of, kinds, layers, needs, quantized_dit
from tests.raising import raises
from veneer import base_models
from veneer.base_models import KINDS, parse_quantize, quantize_model
from veneer.base_models import quantization as module
from veneer.base_models.quantization import check_kind, linear_layers, resolve_components
from veneer.base_models.quantized_linear import Kind, quantize_linear
from veneer.hosts.diffusers_unet import DiffusersUNet
from veneer.injection.errors import BaseModelError, MissingExtra, OptionError, StateError
from veneer.injection.quantized_weight import float_weight, is_quantized, plain_tensors, quantization_of
from veneer.testing import checks_device, parametrize_with_checks
from veneer.testing.pipelines import tiny_pipeline

BOUNDS = {"nf4": (0.08, 0.11), "fp4": (0.11, 0.135), "int4": (0.08, 0.11), "int8": (0.004, 0.01), "fp8": (0.02, 0.03)}
"""First part of a kind's name to its relative error on Gaussian weights, in the Frobenius norm."""
FIXED_DTYPE = "the layer keeps the dtype that it was quantized in"


@kinds()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_on_gaussian_weights(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(768, 1024, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.02)
    weight = linear.weight.detach().double()
    layer = quantize_linear(linear, KINDS[kind])
    low, high = BOUNDS[kind.partition("-")[0]]
    error = (float_weight(layer).double() - weight).norm() / weight.norm()
    assert low < error < high
    assert layer.bias is linear.bias
    assert not any(p.requires_grad for p in layer.parameters())
    stored = sum(t.numel() * t.element_size() for name, t in plain_tensors(layer) if name != "bias")
    assert stored < 1.15 * weight.numel() * KINDS[kind].bits / 8


@kinds()
def test_a_layer_computes_with_the_dequantized_weight(kind: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    layer = quantize_linear(linear, KINDS[kind])
    weight = float_weight(layer)
    x = torch.randn(5, 128, requires_grad=True)
    expected = nn.functional.linear(x.detach(), weight, linear.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1))
    with torch.no_grad():
        got = layer.eval()(x)
    torch.testing.assert_close(got, expected, **({} if kind in EXACT else {"rtol": 0, "atol": 0.05}))
    assert torch.equal(float_weight(layer), weight)


def test_layers_of_a_unet_without_embeddings_modulation_and_convolutions() -> None:
    model = DiffusersUNet().tiny()["sdxl"]()
    found = list(linear_layers(model))
    assert all("attentions" in name for name in found)
    assert {name.rpartition("attentions.0.")[2] for name in found} >= {"proj_in", "transformer_blocks.0.attn1.to_q"}
    every = {name for name, child in model.named_modules() if isinstance(child, nn.Linear)}
    assert {name.rpartition(".")[2] for name in every - {*found}} == {"linear_1", "linear_2", "time_emb_proj"}


@pytest.mark.parametrize(
    ("family", "component", "kept"),
    [
        ("flux", "transformer", {"x_embedder", "context_embedder", "proj_out", "norm1.linear", "norm.linear", "linear_1"}),
        ("sd3", "transformer", {"context_embedder", "proj_out", "norm1.linear", "norm_out.linear"}),
        ("flux", "text_encoder_2", {"DenseReluDense.wo"}),
        ("pixart", "transformer", {"adaln_single.linear", "proj_out", "caption_projection.linear_1"}),
    ],
)
def test_layers_of_a_transformer(family: str, component: str, kept: set[str]) -> None:
    model = tiny_pipeline(family).components[component]
    found = list(linear_layers(model))
    assert found
    assert all(".block" in name or "blocks" in name for name in found)
    every = {name for name, child in model.named_modules() if isinstance(child, nn.Linear)}
    for ending in kept:
        ending_in = {name for name in every if name.endswith(ending) and not (ending == "proj_out" and "single" in name)}
        assert ending_in
        assert not ending_in & {*found}


@needs("nf4")
def test_load_quantizes_the_denoiser_by_default() -> None:
    pipe = base_models.load("bundled", quantize="nf4", dtype=torch.bfloat16)
    found = layers(pipe.unet)
    assert found
    assert all(pipe.unet.get_submodule(name).in_features % 64 == 0 for name in found)
    assert all(pipe.unet.get_submodule(name).compute_dtype == torch.bfloat16 for name in found)
    assert not any(is_quantized(p) for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())
    recipe = quantization_of(pipe.unet)
    assert recipe is not None
    assert (recipe["kind"], recipe["layers"], recipe["compute_dtype"]) == ("nf4", len(found), "bfloat16")


@needs("nf4")
@needs("fp8")
def test_each_component_by_its_own_kind() -> None:
    pipe = base_models.load("bundled", quantize=["unet=fp8", "text_encoder=nf4-dq"])
    kinds_of = {name: quantization_of(pipe.components[name]) for name in ("unet", "text_encoder", "vae")}
    assert {name: recipe and recipe["kind"] for name, recipe in kinds_of.items()} == {
        "unet": "fp8", "text_encoder": "nf4-dq", "vae": None,
    }  # fmt: skip


@kinds(["nf4", "int8", "fp8"])
def test_float_weights_are_freed(kind: str) -> None:
    model = dit()
    weights = [weakref.ref(model.get_submodule(name).weight) for name in linear_layers(model)]
    quantize_model(model, kind)
    gc.collect()
    assert weights
    assert not [ref for ref in weights if ref() is not None]


@pytest.mark.parametrize(
    ("given", "data"),
    [
        ("nf5", {"given": "nf5", "expected": tuple(KINDS)}),
        (["unet="], {"given": ""}),
        (["unet=nf4", "unet=int8"], {"where": "unet", "given": "int8"}),
        ("missing.gguf", {"given": "missing.gguf", "file": "missing.gguf"}),
    ],
)
def test_options_that_mean_nothing(given: Any, data: dict[str, Any]) -> None:
    with raises(OptionError, option="quantize", **data):
        parse_quantize(given)


@pytest.mark.parametrize("given", ["vae=int8", "transformer=int8", "tokenizer=int8"])
def test_a_component_that_cannot_be_quantized(given: str) -> None:
    with raises(OptionError, option="quantize", where=given.partition("=")[0], expected=("text_encoder", "unet")):
        resolve_components(parse_quantize([given]), ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])


@needs("int8")
@pytest.mark.parametrize("given", ["text_encoder_3", "safety_checker"])
def test_a_component_that_the_pipeline_lacks(given: str) -> None:
    pipe = tiny_pipeline("sd3")
    pipe.register_modules(text_encoder_3=None)
    with raises(OptionError, option="quantize", where=given, expected=("text_encoder", "text_encoder_2", "transformer")):
        module.quantize_components(pipe, parse_quantize({given: "int8"}))


def test_the_denoiser_twice() -> None:
    with raises(OptionError, option="quantize", where="unet"):
        resolve_components(parse_quantize(["int8", "unet=int8"]), ["unet"])


@kinds(["nf4", "fp8", "int8-quanto"])
def test_a_missing_library_names_its_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    library = KINDS[kind].library
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == library else found(name, *args))
    with raises(MissingExtra, library=library, extra="quantize"):
        base_models.load("bundled", quantize=kind)
    with raises(MissingExtra, library=library, extra="quantize"):
        quantize_model(dit(), kind)


@needs("nf4")
def test_widths_that_do_not_fit_stay_float() -> None:
    model = tiny_pipeline("flux").text_encoder_2
    with raises(BaseModelError, where="text_encoder_2", given="nf4", expected=64):
        quantize_model(model, "nf4", "text_encoder_2")
    assert not layers(model)


@needs("fp8")
def test_a_kind_that_fails_on_the_device_names_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        raise NotImplementedError("no kernel")

    broken = Kind("nf4", "bitsandbytes", 64, 4, fail)
    monkeypatch.setattr(module, "KINDS", {"nf4": broken, "fp8": KINDS["fp8"]})
    with raises(BaseModelError, where="cpu", given="nf4", expected=("fp8",)):
        check_kind(broken, "cpu", torch.float32)


@needs("fp8")
def test_a_kind_without_gradients_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def dynamic(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(linear, Int8DynamicActivationInt8WeightConfig())
        return linear

    monkeypatch.setattr(module, "KINDS", {})
    with raises(BaseModelError, given="int8-dynamic", expected=()):
        check_kind(Kind("int8-dynamic", "torchao", 1, 8, dynamic), "cpu", torch.float32)


@needs("nf4")
def test_a_quantized_component_is_not_quantized_again() -> None:
    pipe = base_models.load("bundled", quantize="nf4")
    with raises(BaseModelError, where="unet", given="quantized"):
        module.quantize_components(pipe, {"unet": KINDS["nf4"]})
    with raises(BaseModelError, where="model", given="quantized"):
        quantize_model(pipe.unet, "nf4")


def test_a_model_by_an_unknown_kind() -> None:
    with raises(OptionError, option="quantize", given="nf5", expected=tuple(KINDS)):
        quantize_model(dit(), "nf5")


@needs("fp8")
def test_a_model_on_a_device_where_the_kind_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(module, "KINDS", {"int8": Kind("int8", "torch", 1, 8, fail), "fp8": KINDS["fp8"]})
    model = dit()
    with raises(BaseModelError, where="cpu", given="int8", expected=("fp8",)):
        quantize_model(model, "int8")
    assert not layers(model)


@needs("int8")
def test_a_model_with_attachments() -> None:
    model = dit()
    attached = veneer.attach(model, "lora")
    for part, where in ((model, "lora"), (model.transformer_blocks, "0.attn1.to_q.veneer_lora")):
        with raises(StateError, where=where, given="attached"):
            quantize_model(part, "int8")
    attached.merge()
    with raises(StateError, where="lora", given="attached"):
        quantize_model(model, "int8")
    attached.unmerge()
    attached.detach()
    assert quantize_model(model, "int8").quantized == len(layers(model))


def test_layers_of_adapters_stay_float() -> None:
    model = tiny_pipeline("sd").unet
    expected = list(linear_layers(model))
    with torch.random.fork_rng(devices=[]):
        veneer.attach(model, "controlnet")
    assert list(linear_layers(model)) == expected


@pytest.mark.skipif(torch.accelerator.is_available(), reason="diffusers loads it on an accelerator")
def test_a_quantized_folder_given_as_a_float_one(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "bitsandbytes_4bit"}}))
    with raises(BaseModelError, where="unet", given="bitsandbytes_4bit", file=tmp_path):
        base_models.load(tmp_path)


@pytest.mark.parametrize("scale", ["weight.absmax", "SCB", "weight_scale"])
def test_a_quantized_file_given_as_a_float_one(scale: str, tmp_path: Path) -> None:
    name = f"model.diffusion_model.input_blocks.1.1.proj_in.{scale}"
    save_file({name: torch.zeros(4)}, tmp_path / "model.safetensors")
    with raises(BaseModelError, where=name, given="quantized", file=tmp_path / "model.safetensors"):
        base_models.load(tmp_path / "model.safetensors")


IN_ANOTHER_DTYPE = ("batch_rows_are_independent", "weight_form_equals_output_form", "half_precision")
NOT_SIMULATED = "the library cannot move its tensors to a device that is written in Python"


@needs("int4")
def test_optimum_quanto_compiles_nothing_on_a_cpu() -> None:
    quantized_dit("int4")
    from optimum.quanto.library.extensions.cpp import ext

    packed = torch.arange(256, dtype=torch.uint8)
    for bits in (2, 4):
        digits = [value // 2**shift % 2**bits for shift in range(0, 8, bits) for value in range(256)]
        assert torch.ops.quanto.unpack(packed, bits).tolist() == digits
    assert ext._lib is None


INSTALLED = [k for k in ("nf4-dq", "int8", "int8-torchao", "fp8", "int4") if importlib.util.find_spec(KINDS[k].library)]


@parametrize_with_checks(
    [("lora", host_of(kind)) for kind in INSTALLED],
    expected={f"*-{kind}-{name}": FIXED_DTYPE for kind in ("fp8", "int4") for name in IN_ANOTHER_DTYPE}
    | {"*-int4-autocast": FIXED_DTYPE, "*-int4-runs_on_an_accelerator": NOT_SIMULATED}
    | {f"*-{kind}-{check.__name__}": NOT_SIMULATED for kind in ("nf4-dq", "int8") for check in checks_device.CHECKS},
    once=["compiles_to_one_graph"],
)
def test_conformance_on_quantized_models(check: Any) -> None:
    check()


@kinds()
def test_the_small_model_of_the_tests_is_quantized(kind: str) -> None:
    model = quantized_dit(kind)
    assert layers(model) == list(linear_layers(dit()))
    assert not any(is_quantized(p) for name, p in model.named_parameters() if not name.startswith("transformer_blocks"))
