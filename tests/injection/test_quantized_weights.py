"""Adapters on quantized layers: outputs and gradients, rejected methods, merging, identity, and layers that stop gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.base_models.quantized import dequantized, dit, kinds, layers, needs, quantized_dit
from tests.raising import raises
from veneer.base_models import KINDS, quantize_model
from veneer.base_models.quantized_linear import quantize_linear
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection.attachment.fingerprint import fingerprint, identity
from veneer.injection.attachment.plan import supports
from veneer.injection.attachment.quantized_sites import methods_on_quantized
from veneer.injection.errors import BlockedGradient, LoadError, StateError, UnsupportedSite
from veneer.injection.quantized_weight import RECORD, float_weight, is_ordinary, is_quantized, keep_unpacked, stored_parts
from veneer.injection.seams.weight_seam import WeightSeam
from veneer.testing.case import perturb
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.snapshot import assert_same, snapshot

WHERE = ("attn.{q,k,v,out}", "mlp.{in,out}")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (
        "adalora", "bi_lora", "delta_lora", "dora", "fact", "full", "glora", "ia3", "loha", "lokr", "lora", "lora_fa", "mlae",
        "mpo", "oft", "repadapter", "ssf", "svdiff", "vera",
    )},
    "boft": ("boft", {}),
    "boft output": ("boft", {"side": "output"}),
    "dora input": ("dora", {"norm_axis": "input"}),
    "oft output": ("oft", {"side": "output"}),
    "oft rescale": ("oft", {"rescale": True}),
    "olora": ("lora", {"init": "olora"}),
    "pissa": ("lora", {"init": "pissa"}),
}  # fmt: skip
"""Label to method and options: all methods on linear weights, and options that change their form or read W."""


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=needs(kind)) for kind in KINDS])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A quantized model, and a float model with the dequantized weights."""
    quantized = quantized_dit(request.param)
    for name in layers(quantized):
        quantized.get_submodule(name).train()  # because `int8` on a CPU rounds its input in evaluation mode
    return quantized, dequantized(quantized_dit(request.param))


def output_and_gradients(model: nn.Module, attached: Any) -> list[Tensor]:
    """The output of a forward pass in which every input has gradients, and the gradients of the adapters."""
    inputs = DiffusersDiT().sample(model)
    inputs = {key: t.requires_grad_() if t.is_floating_point() else t for key, t in inputs.items()}
    output = model(**inputs, return_dict=False)[0]
    output.square().mean().backward()
    gradients = [p.grad for p in attached.parameters()]
    assert all(g is not None for g in gradients)
    return [output.detach(), *gradients]


def attach(model: nn.Module, label: str) -> Any:
    name, options = METHODS[label]
    torch.manual_seed(0)
    return veneer.attach(model, name, where=WHERE, **options)


@pytest.mark.parametrize("label", METHODS)
def test_a_method_trains_as_on_the_dequantized_model_or_is_rejected(label: str, pair: tuple[Any, Any]) -> None:
    quantized, reference = pair
    expected = attach(reference, label)
    try:
        in_weights = [seam for seam in expected.seams if isinstance(seam, WeightSeam)]
        if any(not adapter.prefers_weight for seam in in_weights for adapter in seam.adapters):
            before = snapshot(quantized)
            site = next(site for site, _ in expected.parts.values())
            with raises(UnsupportedSite, site=site.name, method=METHODS[label][0], expected=methods_on_quantized(site)):
                attach(quantized, label)
            assert_same(before, snapshot(quantized), label)
            return
        perturb(expected)
        attached = attach(quantized, label)
        try:
            perturb(attached)
            tensors = output_and_gradients(reference, expected)
            largest = max(t.abs().max().item() for t in tensors[1:])
            for got, wanted in zip(output_and_gradients(quantized, attached), tensors, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * (1 if wanted is tensors[0] else largest))
        finally:
            attached.detach()
    finally:
        expected.detach()


def test_the_methods_in_the_error_work(pair: tuple[Any, Any]) -> None:
    quantized, reference = pair
    attached = attach(reference, "lora")
    sites = [site for site, _ in attached.parts.values()]
    names = methods_on_quantized(sites[0])
    attached.detach()
    assert {"lora", "dora", "svdiff", "vera"} <= {*names}
    assert not {"glora", "full", "bitfit"} & {*names}
    for name in names:
        config = next(iter(veneer.methods.get(name).examples()))
        roles = sorted({site.role for site in sites if supports(config, site)})
        veneer.attach(quantized, config, where=roles).detach()


def test_added_keys_and_values_do_not_read_the_quantized_weight(pair: tuple[Any, Any]) -> None:
    """Of the output layer, which tells only which attention module it is."""
    outputs = []
    for model in pair:
        torch.manual_seed(0)
        attached = veneer.attach(model, veneer.methods.get("prefix_tuning")(tokens=2, hidden=0))
        assert {site.role for site, _ in attached.parts.values()} == {"attn.out"}
        perturb(attached, size=0.3)
        outputs.append(run(model))
        with attached.enabled(False):
            assert not torch.equal(run(model), outputs[-1])
        attached.detach()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@needs("nf4")
def test_a_packed_weight_in_a_float_dtype_is_not_parametrized() -> None:
    """FSDP stores packed weights as bfloat16: the dtype does not tell, the type does."""
    import bitsandbytes as bnb

    weight = bnb.nn.Params4bit(torch.randn(64, 64), quant_storage=torch.bfloat16, quant_type="nf4").to("cpu")
    assert weight.is_floating_point()
    assert is_quantized(weight)
    assert not is_ordinary(weight)


@kinds()
def test_a_base_weight_that_trains(kind: str) -> None:
    with raises(UnsupportedSite, site="transformer_blocks.0.attn1.to_q.weight", option="train"):
        veneer.attach(quantized_dit(kind), "lora", where="mlp.in", train="name:transformer_blocks.0.attn1.to_q")


@kinds(["int8", "fp8", "int4"])
def test_controls_copy_dequantized_weights(kind: str) -> None:
    unet = tiny_pipeline("sd").unet
    quantize_model(unet, kind)
    with torch.random.fork_rng(devices=[]):
        control = veneer.attach(unet, "controlnet")
        image = veneer.attach(unet, "ip_adapter")
    (_, copied), *_ = control.parts.values()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    expected = float_weight(unet.get_submodule(path))
    assert torch.equal(copied.net.get_submodule(path).weight, expected)
    layer = next(a for n, (_, a) in image.parts.items() if n.startswith("down_blocks.0") and hasattr(a, "to_k_ip"))
    assert torch.equal(layer.to_k_ip.weight, expected)


# merging


def attached_lora(kind: str) -> tuple[Any, Any]:
    model = quantized_dit(kind)
    attached = attach(model, "lora")
    perturb(attached, size=0.3)
    return model, attached


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**DiffusersDiT().sample(model), return_dict=False)[0]


@kinds()
def test_merging_is_rejected_by_default(kind: str) -> None:
    model, attached = attached_lora(kind)
    before, expected = snapshot(model), run(model)
    with raises(UnsupportedSite, site="transformer_blocks.0.attn1.to_q", given="quantized"):
        attached.merge()
    assert_same(before, snapshot(model), kind)
    assert torch.equal(run(model), expected)


@kinds()
def test_merging_quantizes_again_and_reports_the_error(kind: str) -> None:
    model, attached = attached_lora(kind)
    attached.detach()
    bare, original = run(model), {name: float_weight(model.get_submodule(name)).clone() for name in layers(model)}
    values = {name: stored(model.get_submodule(name)) for name in layers(model)}
    attached = attach(model, "lora")
    perturb(attached, size=0.3)
    on = run(model)
    deltas = {site.path: adapter.delta() * adapter.scaling for site, adapter in attached.parts.values()}
    report = attached.merge(requantize=True)
    assert {name.removesuffix(".weight") for name in report.rounding} == {*original} == {*deltas}
    for name, weight in original.items():
        merged = (weight + deltas[name]).detach()
        layer = nn.Linear(merged.shape[1], merged.shape[0])
        layer.weight = nn.Parameter(merged, requires_grad=False)
        got = float_weight(model.get_submodule(name))
        torch.testing.assert_close(got, float_weight(quantize_linear(layer, KINDS[kind])))
        rounding = report.rounding[f"{name}.weight"]
        assert rounding.of_weight == pytest.approx(float((got - merged).norm() / merged.norm()), rel=1e-3)
        assert rounding.of_update == pytest.approx(float((got - merged).norm() / (merged - weight).norm()), rel=1e-3)
    after = run(model)
    assert not torch.equal(after, bare)
    assert (after - on).norm() < (bare - on).norm()
    attached.unmerge()
    assert torch.equal(run(model), on)
    attached.detach()
    assert torch.equal(run(model), bare)
    for name, parts in values.items():
        now = stored(model.get_submodule(name))
        assert all(torch.equal(a, b) for a, b in zip(now, parts, strict=True))


def stored(layer: nn.Module) -> list[Tensor]:
    return [part.detach().clone() for _, part in stored_parts(layer, "weight", layer.weight)]


@kinds(["nf4", "int8", "fp8"])
def test_layers_of_another_tool_cannot_be_quantized_again(kind: str) -> None:
    model, attached = attached_lora(kind)
    for module in model.modules():
        module.__dict__.pop(RECORD, None)
    with raises(UnsupportedSite, given="quantized"):
        attached.merge(requantize=True)


# identity of the base model


@kinds()
def test_a_quantized_model_has_the_fingerprint_of_the_float_model(kind: str) -> None:
    expected = fingerprint(dit())
    model = quantized_dit(kind)
    assert fingerprint(model) == expected
    assert fingerprint(quantized_dit(kind, torch.bfloat16)) == expected
    assert identity(model)["quantization"]["kind"] == kind
    with torch.no_grad():
        other = dit()
        other.transformer_blocks[0].attn1.to_q.weight[0, 0] *= -1
    assert fingerprint(other) != expected
    skipped = "transformer_blocks.0.attn1.to_q.weight"
    assert fingerprint(model, [skipped]) == fingerprint(dit(), [skipped]) != expected


@kinds(["nf4", "int8-torchao"])
def test_a_model_of_another_tool_has_no_fingerprint(kind: str) -> None:
    model = quantized_dit(kind)
    for module in model.modules():
        module.__dict__.pop(RECORD, None)
    assert fingerprint(model) is None


@needs("nf4")
@needs("fp8")
def test_a_file_of_a_quantized_run_loads_on_other_quantizations(tmp_path: Path) -> None:
    _, attached = attached_lora("nf4")
    file = attached.save(tmp_path / "adapter")
    expected = {name: tensor.clone() for name, tensor in attached.state_dict().items()}
    for other, differs in ((quantized_dit("nf4"), False), (quantized_dit("fp8"), True), (dit(), True)):
        loaded = veneer.load(other, file)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
        assert loaded.loaded is not None
        assert bool(loaded.loaded.notes) == differs
    with raises(LoadError, option="base"):
        veneer.load(dit(seed=1), file)
    changed = dit(seed=1)
    quantize_model(changed, "nf4")
    with raises(LoadError, option="base"):
        veneer.load(changed, file)


# detach, and bitsandbytes' repacking for CPUs


@kinds()
def test_training_and_detaching_restore_values_and_outputs_bitwise(kind: str) -> None:
    model = quantized_dit(kind)
    expected, before = run(model), {name: stored(model.get_submodule(name)) for name in layers(model)}
    assert torch.equal(run(model), expected)
    attached = attach(model, "dora")
    model.train()
    for _ in range(2):
        output_and_gradients(model, attached)
    model.eval()
    run(model)
    attached.detach()
    assert torch.equal(run(model), expected)
    for name, parts in before.items():
        assert all(torch.equal(a, b) for a, b in zip(stored(model.get_submodule(name)), parts, strict=True))


@needs("nf4")
def test_attaching_keeps_weights_from_being_repacked() -> None:
    model = quantized_dit("nf4")
    for name in layers(model):
        model.get_submodule(name).support_avx512bf16_for_cpu = True
    veneer.attach(model, "lora")
    run(model)
    assert not any(model.get_submodule(name).support_avx512bf16_for_cpu for name in layers(model))
    assert not any(
        getattr(model.get_submodule(name).weight.quant_state, "packing_format_for_cpu", False) for name in layers(model)
    )


@needs("nf4")
def test_veneer_loads_layers_that_are_not_repacked() -> None:
    model = quantized_dit("nf4")
    run(model)
    assert not any(
        getattr(model.get_submodule(name).weight.quant_state, "packing_format_for_cpu", False) for name in layers(model)
    )


@needs("nf4")
def test_a_repacked_weight_is_rejected() -> None:
    model = quantized_dit("nf4")
    layer = model.transformer_blocks[1].attn1.to_k
    layer.weight.quant_state.packing_format_for_cpu = True
    with raises(StateError, where="transformer_blocks.1.attn1.to_k.weight", given="repacked"):
        veneer.attach(model, "lora")
    with raises(StateError, given="repacked"):
        float_weight(layer)
    with raises(StateError, given="repacked"):
        keep_unpacked(model)


# layers that stop gradients


class WithoutGradients(nn.Module):
    """A layer that runs without autograd, as some mixtures of experts do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(x, self.weight, self.bias)


@pytest.fixture(params=["dynamic", "without autograd"])
def blocked(request: pytest.FixtureRequest) -> Any:
    """A model whose second block has a layer that stops gradients."""
    model = dit()
    attn = model.transformer_blocks[1].attn1
    if request.param == "dynamic":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        torchao.quantize_(attn.to_out[0], torchao.Int8DynamicActivationInt8WeightConfig())
    else:
        attn.to_out[0] = WithoutGradients(attn.to_out[0])
    return model


NAME = "transformer_blocks.1.attn1.to_out.0"


def test_the_probe_names_a_layer_that_stops_gradients(blocked: Any) -> None:
    before = snapshot(blocked)
    with raises(BlockedGradient, where=NAME, given=(NAME,)):
        veneer.attach(blocked, "lora", where="attn.{q,k,v}", sample=True)
    assert_same(before, snapshot(blocked), "a failed probe")


def test_training_names_a_layer_that_stops_gradients(blocked: Any) -> None:
    from veneer.training.param_groups import check_first_gradients

    attached = veneer.attach(blocked, "lora", where="attn.{q,k,v}")

    def loss(step: int, rows: list[int]) -> Tensor:
        return blocked(**DiffusersDiT().sample(blocked), return_dict=False)[0].square().mean()

    hooks = [len(module._forward_hooks) for module in blocked.modules()]
    checked = check_first_gradients(loss, [attached])
    with raises(BlockedGradient, where=NAME):
        checked(1, [0])
    assert [len(module._forward_hooks) for module in blocked.modules()] == hooks


def test_training_checks_the_first_loss_only() -> None:
    from veneer.training.param_groups import check_first_gradients

    model = dit()
    attached, seen = veneer.attach(model, "lora"), []

    def loss(step: int, rows: list[int]) -> Tensor:
        seen.append(sum(len(module._forward_hooks) for module in model.modules()))
        return model(**DiffusersDiT().sample(model), return_dict=False)[0].square().mean()

    plain = sum(len(module._forward_hooks) for module in model.modules())
    checked = check_first_gradients(loss, [attached])
    values = [checked(step, [0]).item() for step in (1, 2)]
    assert seen[0] > plain == seen[1]
    assert values[0] == values[1]


@kinds(["nf4", "int8", "fp8"])
def test_copies_are_independent(kind: str) -> None:
    model = quantized_dit(kind)
    other = copy.deepcopy(model)
    attached = attach(other, "lora")
    perturb(attached, size=0.3)
    attached.merge(requantize=True)
    expected = quantized_dit(kind)
    assert torch.equal(run(model), run(expected))
    assert not torch.equal(run(other), run(expected))


@needs("nf4")
def test_adapters_have_the_dtype_of_the_float_layers() -> None:
    """VeRA's matrices are shared by quantized layers and others."""
    model = nn.Module.to(quantized_dit("nf4"), torch.float64)
    attached = veneer.attach(model, "vera")
    assert {p.dtype for p in attached.parameters()} == {torch.float64}
    assert run(model).dtype == torch.float64
