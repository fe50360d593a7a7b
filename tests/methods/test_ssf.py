"""SSF: γ ∘ y + β after every layer, written out channel by channel, and folded into weights and biases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.raising import raises
from veneer.injection import UnsupportedSite, attach, hosts
from veneer.injection.sites import NormSite, WeightSite
from veneer.methods.reparameterized.scale.ssf import SSF, ScaleAdapter, ScaleShiftAdapter

TINY = [
    ("timm_vit", "vit"),
    ("timm_vit", "beit"),
    ("open_clip", "vit"),
    ("timm_convnext", "convnext"),
    ("timm_conv", "efficientnet"),
]


def tiny(host: str, key: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    found = hosts.get(host)()
    model = found.tiny()[key]().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)  # new biases are zero, and then no rows of them are wrong
    return model, found.sample(model)


def by_hand(model: nn.Module, tuned: Any) -> dict[str, Tensor]:
    """The model's tensors, row by row times γ, and β added to biases; of layers with a bias."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for site, adapter in tuned.parts.values():
        rows = range(*site.rows) if site.rows else range(len(adapter.gain))
        biases = range(*site.bias_rows) if getattr(site, "bias_rows", None) else range(len(adapter.gain))
        for i, (row, there) in enumerate(zip(rows, biases, strict=True)):
            gamma = 1 + adapter.gain[i].item()
            found[f"{site.path}.{site.param}"][row] *= gamma
            if site.bias:
                found[site.bias][there] = gamma * found[site.bias][there] + adapter.shift[i].item()
    return found


def logits(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(("host", "key"), TINY)
def test_outputs_are_those_of_weights_and_biases_changed_by_hand(host: str, key: str) -> None:
    model, inputs = tiny(host, key)
    bare = copy.deepcopy(model)
    tuned = attach(model, "ssf")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        if any(a.__class__ is ScaleShiftAdapter and not s.bias for s, a in tuned.parts.values()):
            tuned.detach()  # what has no bias cannot be written by hand
            tuned = attach(model, "ssf", where=[f"name:{s.name}" for s, a in tuned.parts.values() if s.bias])
        expected = by_hand(bare, tuned)
        want = logits(torch.func.functional_call(bare, expected, (), inputs))
        beside = logits(model(**inputs))
        assert not torch.allclose(beside, logits(bare(**inputs)))
        torch.testing.assert_close(beside, want)
        tuned.merge()
        torch.testing.assert_close(logits(model(**inputs)), want)
    for name, p in tuned.host_state_dict().items():
        if name in expected:
            torch.testing.assert_close(p, expected[name], msg=name)


LAYERS = [
    (nn.Linear(6, 4), (3, 5, 6), -1),
    (nn.Linear(6, 4, bias=False), (3, 6), -1),
    (nn.Conv1d(6, 4, 3), (3, 6, 5), 1),
    (nn.Conv2d(6, 4, 3, stride=2, groups=2), (3, 6, 5, 7), 1),
    (nn.Conv3d(6, 6, 1, groups=6, bias=False), (3, 6, 2, 3, 4), 1),
    (nn.LayerNorm(6), (3, 5, 6), -1),
    (nn.BatchNorm2d(6), (3, 6, 5, 7), 1),
    (nn.BatchNorm1d(6), (3, 6), 1),
    (nn.GroupNorm(2, 6), (3, 6, 5), 1),
    (nn.RMSNorm(6), (3, 5, 6), -1),
]


def site_of(layer: Any, dim: int, called: bool = True) -> WeightSite | NormSite:
    bias = "0.bias" if getattr(layer, "bias", None) is not None else ""
    if isinstance(layer, nn.Linear):
        return WeightSite(name="l", role="mlp.in", path="0", d_out=4, d_in=6, bias=bias, called=called)
    if hasattr(layer, "kernel_size"):
        shape = {"d_out": layer.out_channels, "d_in": 6, "kernel": layer.kernel_size, "groups": layer.groups}
        return WeightSite(name="c", role="conv", path="0", kind="conv", bias=bias, called=called, **shape)
    return NormSite(name="n", role="norm", path="0", width=6, bias=bias, channel_dim=dim, called=called)


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize(("layer", "shape", "dim"), LAYERS, ids=lambda v: repr(v) if isinstance(v, nn.Module) else "")
def test_each_channel_is_scaled_and_shifted(layer: nn.Module, shape: tuple[int, ...], dim: int, strength: float) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double().eval()
    adapter: Any = SSF().build(site_of(layer, dim)).double()
    adapter.strength.fill_(strength)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x).detach()
    expected = torch.stack(
        [(1 + strength * g) * part + strength * b for g, b, part in zip(adapter.gain, adapter.shift, y.unbind(dim), strict=True)],
        dim,
    )
    torch.testing.assert_close(adapter.output(x, y), expected)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    changed = {"weight": adapter.weight(weight)} | ({} if bias is None else {"bias": adapter.bias(bias, None)})
    merged = torch.func.functional_call(layer, changed, (x,))
    if bias is None:  # the shift has nowhere to go
        lanes = [1] * y.ndim
        lanes[dim] = -1
        merged = merged + strength * adapter.shift.view(lanes)
    torch.testing.assert_close(merged, expected)


def test_it_starts_near_the_host_as_the_paper_says() -> None:
    torch.manual_seed(0)
    adapter: Any = SSF().build(WeightSite(name="l", role="mlp.in", path="l", d_out=20_000, d_in=2))
    for tensor in (adapter.gain, adapter.shift):
        assert abs(tensor.mean().item()) < 6e-4  # four standard errors
        assert tensor.std().item() == pytest.approx(0.02, rel=0.02)
    assert not SSF.identity_at_start


def test_where_there_is_no_bias() -> None:
    """Called: shifted beside the weight, and no merge. Read: scaled only."""
    assert type(SSF().build(site_of(nn.Linear(6, 4, bias=False), -1))) is ScaleShiftAdapter
    read = site_of(nn.Linear(6, 4, bias=False), -1, called=False)
    assert type(SSF().build(read)) is ScaleAdapter
    assert SSF().count(read) == 4
    model = timm.create_model("resnet18", num_classes=3).eval()
    tuned = attach(model, "ssf", where="name:layer1.0.conv1")
    with raises(UnsupportedSite, site="layer1.0.conv1", given="ScaleShiftAdapter", expected="bias"):
        tuned.merge()


def test_slices_of_a_fused_weight_are_the_whole() -> None:
    model, inputs = tiny("timm_vit", "vit")
    twin = copy.deepcopy(model)
    whole, slices = attach(model, "ssf", where="attn.qkv"), attach(twin, "ssf", where="attn.{q,k,v}")
    with torch.no_grad():
        for depth in range(2):
            own = whole.parts[f"blocks.{depth}.attn.qkv"][1]
            for name in ("gain", "shift"):
                parts = [getattr(slices.parts[f"blocks.{depth}.attn.{x}"][1], name) for x in "qkv"]
                getattr(own, name).copy_(torch.cat(parts))
        torch.testing.assert_close(model(**inputs), twin(**inputs))
    assert whole.report().trainable == slices.report().trainable


def test_published_counts() -> None:
    """ViT-B/16: 2·(768 + 768 + 2,304 + 768 + 3,072 + 768) a block, and 1,536 for the patches and for the last norm."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "ssf")
    assert tuned.report().trainable == 12 * 16_896 + 1_536 + 1_536 == 205_824
    first = [SSF().count(s) for s, _ in tuned.parts.values() if s.depth == 0]
    assert sum(first) == 16_896


def test_norms_of_queries_and_keys_are_left_out_unless_named() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, qk_norm=True, num_classes=3).eval()
    roles = {s.role for s, _ in attach(model, "ssf", name="default").parts.values()}
    assert "norm" in roles
    assert "norm.qk" not in roles
    assert {s.role for s, _ in attach(model, "ssf", where="norm.qk").parts.values()} == {"norm.qk"}


@pytest.mark.parametrize(
    ("name", "where", "default", "code"),
    [
        ("swin_tiny_patch4_window7_224", "conv norm attn.qkv attn.out mlp not:name:*downsample*", 107_136, 99_072),
        ("convnext_tiny", "conv norm mlp not:name:*downsample*", 98_688, 94_656),
    ],
)
def test_counts_of_the_default_and_of_the_code_s_places(name: str, where: str, default: int, code: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    for own, count in ((None, default), (where, code)):
        tuned = attach(model, "ssf", where=own)
        assert tuned.report().trainable == count
        tuned.detach()
