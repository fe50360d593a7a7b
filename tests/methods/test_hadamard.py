"""Hadamard adapter: w ∘ A + b at the output of every attention, against blocks and weights that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.bottlenecks import blocks_written_out, picture, stirred, tiny
from tests.methods.dense import check_written_out
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.sites import WeightSite
from veneer.methods.additive.vectors.hadamard import Hadamard


def written(site: Any, t: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row i of W times w_i, element i of the bias times w_i plus b_i."""
    assert bias is not None
    rows = torch.stack([row * (1 + g) for row, g in zip(weight, t["gain"], strict=True)])
    return rows, torch.stack([old * (1 + g) + b for old, g, b in zip(bias, t["gain"], t["shift"], strict=True)])


@pytest.mark.parametrize("key", ["vit", "vit_registers"])
def test_a_vit_written_out(key: str) -> None:
    """x + LayerScale(w ∘ Attn(LN x) + b), and the gradients of w and b."""
    bare, model = tiny(key), tiny(key)
    adapters: dict[str, Any] = {**stirred(attach(model, "hadamard"))}
    assert list(adapters) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    leaves = {n: [p.detach().clone().requires_grad_() for p in (a.gain, a.shift)] for n, a in adapters.items()}

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        gain, shift = leaves[f"blocks.{depth}.attn.proj"]
        x = x + b.ls1(b.attn(b.norm1(x)) * (1 + gain) + shift)
        return x + b.ls2(b.mlp(b.norm2(x)))

    expected, got = blocks_written_out(bare, block, picture()), model(picture())
    torch.testing.assert_close(got, expected)
    assert (expected - bare(picture())).abs().max() > 1e-3
    expected.square().sum().backward()
    got.square().sum().backward()
    for name, adapter in adapters.items():
        for p, leaf in zip((adapter.gain, adapter.shift), leaves[name], strict=True):
            torch.testing.assert_close(p.grad, leaf.grad, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize(
    ("host", "key", "roles"),
    [
        ("diffusers_dit", "dit", {"attn.out"}),
        ("diffusers_dit", "pixart", {"attn.out", "xattn.out"}),
        ("clip_text", "clip", {"attn.out"}),
        ("open_clip", "vit", {"attn.out"}),  # packed attention, which reads its weights
    ],
)
def test_it_scales_rows_and_the_bias(host: str, key: str, roles: set[str]) -> None:
    tuned = check_written_out(host, key, "hadamard", written)
    assert {site.role for site, _ in tuned.parts.values()} == roles


def test_a_convolution_is_scaled_by_channel() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=4, padding=1).double()
    site = WeightSite(name="l", role="conv.dw", path="l", kind="conv", d_out=4, d_in=4, kernel=(3, 3), padding=(1, 1), groups=4)
    torch.manual_seed(0)
    adapter: Any = Hadamard().build(site).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
        y = layer(x)
        expected = torch.stack([(1 + g) * c + b for g, b, c in zip(adapter.gain, adapter.shift, y.unbind(1), strict=True)], 1)
        torch.testing.assert_close(adapter.output(x, y), expected)
        changed = {"weight": adapter.weight(layer.weight), "bias": adapter.bias(layer.bias, lambda: layer.weight)}
        torch.testing.assert_close(torch.func.functional_call(layer, changed, (x,)), expected)


def test_strength_multiplies_the_change() -> None:
    torch.manual_seed(0)
    adapter: Any = Hadamard().build(WeightSite(name="l", role="attn.out", path="l", d_out=5, d_in=5)).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    y, bias = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    whole = [adapter.output(y, y) - y, adapter.bias(bias, lambda: bias) - bias]
    adapter.strength.fill_(0.25)
    for part, all_of_it in zip([adapter.output(y, y) - y, adapter.bias(bias, lambda: bias) - bias], whole, strict=True):
        torch.testing.assert_close(part, all_of_it / 4)


def test_published_counts() -> None:
    """ViT-B/16: 12·2·768; in the upper eight blocks 8·2·768."""
    with torch.device("meta"):
        for where, expected in ((None, 18_432), ("attn.out@4:", 12_288)):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
            assert attach(vit, "hadamard", where=where).report().trainable == expected


def test_initial_values() -> None:
    """w = 1 and b = 0: the first output is the host's, bitwise."""
    adapter: Any = Hadamard().build(WeightSite(name="l", role="attn.out", path="l", d_out=5, d_in=5))
    assert not adapter.gain.any()
    assert not adapter.shift.any()
    assert Hadamard.identity_at_start
    y = torch.randn(2, 3, 5)
    assert torch.equal(adapter.output(y, y), y)


def test_networks_without_attention_are_adapted_where_they_mix_positions() -> None:
    convnext = timm.create_model("convnext_atto", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=3)
    assert {site.role for site, _ in attach(convnext, "hadamard").parts.values()} == {"conv.dw"}
    resnet = timm.create_model("resnet18", channels=(8, 8, 8, 8), stem_width=8, num_classes=3).eval()
    tuned = attach(resnet, "hadamard")
    assert {site.role for site, _ in tuned.parts.values()} == {"conv.res"}
    with raises(UnsupportedSite, given="HadamardAdapter", expected="bias"):
        tuned.merge()
