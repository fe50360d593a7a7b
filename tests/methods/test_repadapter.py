"""RepAdapter: x + s·(B (A x + a) + c) before a layer, element by element, and merged into the layer's weight and bias."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.raising import raises
from veneer.injection import UnsupportedSite, attach, hosts
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.repadapter import BiasedRepBottleneck, RepAdapter, RepBottleneck


@torch.no_grad()
def slow(adapter: Any, x: Tensor, scale: float) -> Tensor:
    """x' for x (n, d_in), by explicit sums; output i of group g reads the bottleneck's part g."""
    n, d_in = x.shape
    h, groups = len(adapter.down), adapter.groups
    after = x.clone()
    for row in range(n):
        low = [float((adapter.down[k] * x[row]).sum()) for k in range(h)]
        if hasattr(adapter, "down_bias"):
            low = [value + float(adapter.down_bias[k]) for k, value in enumerate(low)]
        for i in range(d_in):
            group = i // (d_in // groups)
            mine = low[group * (h // groups) : (group + 1) * (h // groups)]
            change = sum(float(adapter.up[i, k]) * value for k, value in enumerate(mine))
            after[row, i] += scale * (change + (float(adapter.up_bias[i]) if hasattr(adapter, "up_bias") else 0.0))
    return after


def site_of(layer: nn.Module, bias: str = "0.bias") -> WeightSite:
    if isinstance(layer, nn.Linear):
        return WeightSite(name="l", role="mlp.in", path="0", d_out=layer.out_features, d_in=layer.in_features, bias=bias)
    return WeightSite(
        name="c", role="mlp.in", path="0", kind="conv", d_out=layer.out_channels, d_in=layer.in_channels, bias=bias,
        kernel=layer.kernel_size, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
    )  # fmt: skip


def trained(method: RepAdapter, layer: nn.Module) -> Any:
    torch.manual_seed(1)
    adapter = method.build(site_of(layer)).double().eval()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.5)
    return adapter


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "scale"), [(1, 1.0), (2, 0.5), (4, 10.0)])
@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 5), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1, stride=2), nn.Conv1d(8, 5, 1)], ids=repr
)
def test_inputs_and_folded_tensors_are_the_formula(layer: nn.Module, groups: int, scale: float, bias: bool) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    adapter = trained(RepAdapter(bottleneck=4, up_groups=groups, scale=scale, bias=bias), layer)
    adapter.strength.fill_(0.75)
    size = (3,) if isinstance(layer, nn.Linear) else (3, 2, 4)[: layer.weight.ndim - 1]
    x = torch.randn(2, *size[1:], 8, dtype=torch.float64)
    expected = slow(adapter, x.reshape(-1, 8), 0.75 * scale).view(x.shape)
    if not isinstance(layer, nn.Linear):
        x, expected = x.movedim(-1, 1), expected.movedim(-1, 1)
    torch.testing.assert_close(adapter.input(x), expected)
    changed = {"weight": adapter.weight(layer.weight)}
    if bias:
        changed["bias"] = adapter.bias(layer.bias, lambda: layer.weight)
    torch.testing.assert_close(torch.func.functional_call(layer, changed, (x,)), layer(expected))


def test_gradients_of_the_optimized_products_are_those_of_plain_products() -> None:
    layer = nn.Linear(8, 5).double()
    adapter = trained(RepAdapter(bottleneck=4), layer)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: adapter.input(x), (x, *adapter.parameters()))


def test_dropout_is_on_the_bottleneck_and_in_training_only() -> None:
    """Elements of A x + a are dropped, and the others are scaled: with p = 0.5 each is doubled or zero."""
    adapter = trained(RepAdapter(bottleneck=2, up_groups=1, dropout=0.5), nn.Linear(8, 5))
    x = torch.randn(64, 8, dtype=torch.float64)
    plain = adapter.input(x)
    assert torch.equal(adapter.input(x), plain)
    adapter.train()
    low = x @ adapter.down.T + adapter.down_bias
    found = set()
    for row, got in enumerate(adapter.input(x)):
        kept = [
            (a, b)
            for a in (0, 2)
            for b in (0, 2)
            if torch.allclose(got, x[row] + adapter.up @ (low[row] * torch.tensor([a, b])) + adapter.up_bias)
        ]
        assert len(kept) == 1
        found.add(kept[0])
    assert len(found) == 4


def test_in_models_before_attention_and_mlp() -> None:
    """timm's ViT with x changed by hand after the norms: one adapter for q, k and v together."""
    torch.manual_seed(0)
    host = hosts.get("timm_vit")()
    model = host.tiny()["vit"]().double().eval()
    by_hand, inputs = copy.deepcopy(model), host.sample(model)
    tuned = attach(model, "repadapter", bottleneck=4)
    assert [s.name for s, _ in tuned.parts.values()] == [f"blocks.{i}.{x}" for i in range(2) for x in ("attn.qkv", "mlp.fc1")]
    with torch.no_grad():
        for site, adapter in tuned.parts.values():
            for p in adapter.parameters():
                p.normal_(std=0.2)
            norm = {"attn.qkv": "norm1", "mlp.in": "norm2"}[site.role]
            by_hand.get_submodule(f"blocks.{site.depth}.{norm}").register_forward_hook(
                lambda m, x, y, adapter=adapter: slow(adapter, y.flatten(0, 1), 1.0).view(y.shape)
            )
        torch.testing.assert_close(model(**inputs), by_hand(**inputs))
        tuned.merge()
        torch.testing.assert_close(model(**inputs), by_hand(**inputs))


@pytest.mark.parametrize(
    ("host", "key"), [("open_clip", "vit"), ("timm_vit", "beit"), ("clip_text", "clip"), ("timm_convnext", "convnext_conv_mlp")]
)
def test_read_weights_separate_ones_and_convolutions_merge_to_the_same_outputs(host: str, key: str) -> None:
    torch.manual_seed(0)
    found = hosts.get(host)()
    model = found.tiny()[key]().double().eval()
    inputs = found.sample(model)
    tuned = attach(model, "repadapter", sample=True)
    roles = {s.role for s, _ in tuned.parts.values()}
    assert roles == {
        "open_clip": {"attn.qkv", "mlp.in"}, "timm_vit": {"attn.qkv", "mlp.in"}, "timm_convnext": {"mlp.in"},
        "clip_text": {"attn.q", "attn.k", "attn.v", "mlp.in"},
    }[host]  # fmt: skip
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        before, _ = torch.utils._pytree.tree_flatten(model(**inputs))
        tuned.merge()
        after, _ = torch.utils._pytree.tree_flatten(model(**inputs))
    for a, b in zip(after, before, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)


def test_biases_are_where_they_can_be_had() -> None:
    fields = {"name": "l", "role": "attn.qkv", "path": "l", "d_out": 6, "d_in": 8}
    build = RepAdapter().build
    assert type(build(WeightSite(**fields, bias="l.bias"))) is BiasedRepBottleneck
    assert type(build(WeightSite(**fields, bias="l.bias", called=False))) is BiasedRepBottleneck
    assert type(build(WeightSite(**fields))) is BiasedRepBottleneck
    assert type(build(WeightSite(**fields, called=False))) is RepBottleneck
    assert type(build(WeightSite(**fields, rows=(0, 6)))) is RepBottleneck
    assert type(RepAdapter(bias=False).build(WeightSite(**fields, bias="l.bias"))) is RepBottleneck


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, padding=1)], ids=repr
)
def test_convolutions_that_cannot_take_it_in_are_rejected(layer: nn.Module) -> None:
    with raises(OptionError, method="repadapter", option="where", given=(layer.kernel_size, layer.groups, layer.padding)):
        RepAdapter().build(site_of(layer))


def test_rejections_name_the_site_and_the_options() -> None:
    model = timm.create_model("convnext_atto", num_classes=3)
    with raises(UnsupportedSite, site="stages.0.blocks.0.conv_dw", option="where", given=((7, 7), 40, (3, 3))):
        attach(model, "repadapter", where="conv.dw")
    with raises(UnsupportedSite, option="up_groups", given=16, expected=40):
        attach(model, "repadapter", bottleneck=16, up_groups=16)
    width, groups = RepAdapter().bottleneck, RepAdapter().up_groups
    wrong: tuple[tuple[dict[str, Any], str, Any], ...] = (
        ({"bottleneck": 9}, "bottleneck", (9, groups)),
        ({"up_groups": 0}, "bottleneck", (width, 0)),
        ({"dropout": 1.0}, "dropout", 1.0),
    )
    for options, option, given in wrong:
        with raises(OptionError, method="repadapter", option=option, given=given):
            RepAdapter(**options)


def test_published_counts() -> None:
    """24·(768·8 + 8 + 768·8 / 2 + 768) for ViT-B/16, and the paper's 0.22 M without biases."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "repadapter")
    assert tuned.report().trainable == 239_808
    assert sum(p.numel() for p in tuned.groups()[0]["params"]) == 239_808
    tuned.detach()
    assert attach(vit, "repadapter", bias=False).report().trainable == 221_184
