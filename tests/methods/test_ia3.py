"""(IA)³: k, v and the inner activations of the MLP times a vector, against explicit weights and against peft."""

from __future__ import annotations

import copy

import peft
import pytest
import timm
import torch
from torch import nn

from tests.hosts.published import build
from veneer.injection import attach, hosts
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.scale.ia3 import IA3, ScaledInput, ScaledOutput


def site_of(module: nn.Module, role: str) -> WeightSite:
    if isinstance(module, nn.Linear):
        return WeightSite(name="l", role=role, path="0", d_out=module.out_features, d_in=module.in_features)
    return WeightSite(
        name="c", role=role, path="0", kind="conv", d_out=module.out_channels, d_in=module.in_channels,
        kernel=module.kernel_size, stride=module.stride, padding=module.padding, dilation=module.dilation, groups=module.groups,
    )  # fmt: skip


LAYERS = [
    nn.Linear(6, 4),
    nn.Linear(6, 4, bias=False),
    nn.Conv1d(6, 4, 3),
    nn.Conv2d(6, 4, 3, stride=2, groups=2),
    nn.Conv2d(6, 6, 3, groups=6, bias=False),
    nn.Conv3d(6, 4, 1),
]


def trained(base: nn.Module, role: str) -> ScaledInput | ScaledOutput:
    torch.manual_seed(0)
    adapter = IA3().build(site_of(base, role)).double()
    adapter.enter(nn.Sequential(base))
    nn.init.normal_(adapter.delta)
    return adapter


def inputs(base: nn.Module) -> torch.Tensor:
    size = () if isinstance(base, nn.Linear) else (5, 6, 4)[: base.weight.ndim - 2]
    return torch.randn(3, 6, *size, dtype=torch.float64)


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_outputs_are_rescaled_one_by_one(base: nn.Module) -> None:
    base = copy.deepcopy(base).double()
    adapter, expected, x = trained(base, "attn.v"), copy.deepcopy(base), inputs(base)
    with torch.no_grad():
        for o in range(len(expected.weight)):
            expected.weight[o] *= 1 + adapter.delta[o]
    torch.testing.assert_close(adapter.output(x, base(x)), expected(x))
    torch.testing.assert_close(adapter.weight(base.weight), expected.weight)


@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_inputs_are_rescaled_one_by_one(base: nn.Module) -> None:
    base = copy.deepcopy(base).double()
    adapter, expected, x = trained(base, "mlp.out"), copy.deepcopy(base), inputs(base)
    scaled = torch.stack([x[:, i] * (1 + adapter.delta[i]) for i in range(6)], 1)
    expected.weight.data.copy_(adapter.weight(base.weight))
    torch.testing.assert_close(adapter.input(x), scaled)
    torch.testing.assert_close(expected(x), base(scaled))


@pytest.mark.parametrize("role", ["attn.k", "mlp.out"])
@pytest.mark.parametrize("base", LAYERS, ids=repr)
def test_a_new_adapter_is_the_identity_bitwise_and_its_count_is_the_formula(base: nn.Module, role: str) -> None:
    site = site_of(base, role)
    adapter = IA3().build(site)
    adapter.enter(nn.Sequential(base))
    x = inputs(base).float()
    assert torch.equal(adapter.weight(base.weight), base.weight)
    after = base(adapter.input(x)) if role == "mlp.out" else adapter.output(x, base(x))
    assert torch.equal(after, base(x))
    assert IA3().count(site) == adapter.delta.numel() == (6 if role == "mlp.out" else base.weight.shape[0])


def test_in_a_model_inputs_and_rows_of_a_fused_weight() -> None:
    """timm's ViT with each change written into its weights by hand: rows of k and v in the fused qkv, columns of fc2."""
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().double().eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)  # new biases are zero, and then no rows of them are wrong
    by_hand, x = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "ia3", sample=True)
    with torch.no_grad():
        for name, (site, adapter) in tuned.parts.items():
            adapter.delta.normal_(std=0.3)
            weight = by_hand.get_submodule(site.path).weight
            if site.role == "mlp.out":
                weight *= 1 + adapter.delta
            else:
                assert site.role in ("attn.k", "attn.v"), name
                weight[slice(*site.rows)] *= 1 + adapter.delta[:, None]
        torch.testing.assert_close(model(**x), by_hand(**x))
        tuned.merge()
        torch.testing.assert_close(model(**x), by_hand(**x))


def test_peft_gives_the_same_outputs() -> None:
    """Without a bias on outputs, as peft scales it too."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"v": nn.Linear(6, 4, bias=False), "out": nn.Linear(6, 4)}).double()
    config = peft.IA3Config(target_modules=["v", "out"], feedforward_modules=["out"], init_ia3_weights=False)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    for name, role in (("v", "attn.v"), ("out", "mlp.out")):
        adapter = trained(base[name], role)
        adapter.delta.data.copy_(theirs[name].ia3_l["default"].flatten() - 1)
        ours = base[name](adapter.input(x)) if name == "out" else adapter.output(x, base[name](x))
        torch.testing.assert_close(ours, theirs[name](x))


def test_published_counts() -> None:
    """12·(768 + 768 + 3,072) for ViT-B/16; the UNets' k and v outputs and inner widths of the MLPs."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "ia3").report().trainable == 55_296
    assert attach(build("sd15"), "ia3").report().trainable == 99_840
    assert attach(build("sdxl"), "ia3").report().trainable == 665_600


def test_which_side_is_rescaled_is_an_option() -> None:
    site = site_of(LAYERS[0], "mlp.in")
    assert isinstance(IA3().build(site), ScaledOutput)
    assert isinstance(IA3(inputs=("mlp.*",)).build(site), ScaledInput)
    assert isinstance(IA3(inputs="mlp.in").build(site), ScaledInput)
    assert isinstance(IA3(inputs=()).build(site_of(LAYERS[0], "mlp.out")), ScaledOutput)
