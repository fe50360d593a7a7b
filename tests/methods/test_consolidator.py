"""Consolidator: y + G x + t with a block-diagonal G, against loops over groups and blocks that are written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.bottlenecks import blocks_written_out, picture, stirred, tiny
from tests.methods.layers import site_of, trained
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import OptionError
from veneer.methods.reparameterized.block_diagonal.consolidator import Consolidator

LAYERS = [nn.Linear(8, 12), nn.Conv2d(8, 4, 3, stride=2, padding=1), nn.Conv1d(8, 8, 1)]


def dense(adapter: Any, shuffle: bool, groups: int) -> Tensor:
    """G, entry by entry: row o of group g reads inputs g·n … (g + 1)·n, or, shuffled, those that are dealt to that group."""
    d_out, inputs = adapter.blocks.shape[:2]
    d_in = inputs * groups
    order = list(range(d_in))
    if shuffle:
        order = [k * inputs + i for i in range(inputs) for k in range(groups)]
    full = adapter.blocks.new_zeros(d_out, d_in, *adapter.blocks.shape[2:])
    for o in range(d_out):
        group = o // (d_out // groups)
        for i in range(inputs):
            full[o, order[group * inputs + i]] = adapter.blocks[o, i]
    return full


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_values_gradients_and_merged_tensors_are_the_formula(layer: nn.Module, shuffle: bool) -> None:
    layer = copy.deepcopy(layer).double()
    adapter: Any = trained(Consolidator(channel_groups=4, shuffle=shuffle), site_of(layer))
    adapter.strength.fill_(0.75)
    x = torch.randn(2, 8, *(5, 5)[: layer.weight.ndim - 2], dtype=torch.float64, requires_grad=True)
    inputs = [x, adapter.blocks]
    got = adapter.output(x, layer(x))
    full = 0.75 * dense(adapter, shuffle, 4)
    expected = torch.func.functional_call(layer, {"weight": layer.weight + full, "bias": layer.bias + 0.75 * adapter.shift}, (x,))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(adapter.weight(layer.weight), layer.weight + full)
    torch.testing.assert_close(adapter.bias(layer.bias, lambda: layer.weight), layer.bias + 0.75 * adapter.shift)
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-3


def test_a_vit_with_the_papers_blocks() -> None:
    """All four layers of a block, with torch's grouped convolution; merging gives the same outputs."""
    bare, model = tiny(), tiny()
    tuned = attach(model, "consolidator", channel_groups=8)
    adapters = stirred(tuned)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert [*adapters] == [f"blocks.{i}.{layer}" for i in range(2) for layer in layers]

    def layer(name: str, module: nn.Module, x: Tensor) -> Tensor:
        a: Any = adapters[name]
        change = F.conv1d(x.transpose(1, 2), a.blocks[:, :, None], a.shift, groups=8).transpose(1, 2)
        y: Tensor = module(x) + change
        return y

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        normed, heads = b.norm1(x), b.attn.num_heads
        q, k, v = layer(f"blocks.{depth}.attn.qkv", b.attn.qkv, normed).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + layer(f"blocks.{depth}.attn.proj", b.attn.proj, out)
        low = F.gelu(layer(f"blocks.{depth}.mlp.fc1", b.mlp.fc1, b.norm2(x)))
        return x + layer(f"blocks.{depth}.mlp.fc2", b.mlp.fc2, low)

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3
        tuned.merge()
        torch.testing.assert_close(model(picture()), expected)


def test_drop_path_drops_whole_samples_in_training() -> None:
    layer = nn.Linear(8, 4).double()
    adapter = trained(Consolidator(channel_groups=2, drop_path=0.25), site_of(layer))
    x, y = torch.randn(400, 3, 8, dtype=torch.float64), torch.zeros(400, 3, 4, dtype=torch.float64)
    whole = adapter.output(x, y)
    torch.manual_seed(0)
    got = adapter.train().output(x, y)
    dropped = got.flatten(1).abs().amax(1) == 0
    torch.testing.assert_close(got[~dropped], whole[~dropped] / 0.75)
    assert 0.17 < dropped.double().mean() < 0.33


def test_groups_divide_both_widths() -> None:
    for d_in, d_out, inputs in ((768, 2304, 2), (3072, 768, 8), (96, 288, 1), (100, 50, 50)):
        adapter: Any = Consolidator().build(site_of(nn.Linear(d_in, d_out)))
        assert adapter.blocks.shape == (d_out, inputs)


def test_counts() -> None:
    """Those of the authors' code on ViT-B/16."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "consolidator").report().trainable == 304_128


def test_start() -> None:
    """Weights and biases uniform within 0.001."""
    torch.manual_seed(0)
    for p in Consolidator(channel_groups=4).build(site_of(nn.Linear(128, 256))).parameters():
        assert 0.98e-3 < p.abs().max() <= 1e-3
        assert p.mean().abs() < 1e-4


def test_grouped_convolutions_are_not_supported() -> None:
    assert supports(Consolidator(), site_of(nn.Conv2d(8, 8, 3)))
    assert not supports(Consolidator(), site_of(nn.Conv2d(8, 8, 3, groups=8)))


@pytest.mark.parametrize(("option", "given"), [("channel_groups", 0), ("drop_path", 1.0), ("bound", 0.0)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="consolidator", option=option, given=given):
        Consolidator(**{option: given})
