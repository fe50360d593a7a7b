"""AdapterBias: y + (w·u + c) v at the MLP's output layer, against blocks and weights that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.bottlenecks import blocks_written_out, picture, stirred, tiny
from tests.methods.dense import check_written_out
from tests.raising import raises
from veneer.injection import SelectionError, UnsupportedSite, attach
from veneer.injection.sites import WeightSite
from veneer.methods.additive.vectors.adapter_bias import AdapterBias


def site_of(d_out: int = 5, d_in: int = 7, **fields: Any) -> WeightSite:
    return WeightSite(name="l", role="mlp.out", path="l", d_out=d_out, d_in=d_in, **fields)


def written(site: Any, t: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row i of W gets v_i w, element i of b gets v_i c."""
    (w,), (c,) = ([v for k, v in t.items() if k.endswith(name)] for name in ("token.weight", "token.bias"))
    rows = torch.stack([row + v * w[0] for row, v in zip(weight, t["vector"], strict=True)])
    assert bias is not None
    return rows, torch.stack([b + v * c[0] for b, v in zip(bias, t["vector"], strict=True)])


@pytest.mark.parametrize("share", [False, True])
def test_a_vit_written_out(share: bool) -> None:
    """x' + MLP(LN x') + (w·u + c) v with u = GELU(fc1(LN x')), token by token, and the gradients of w, c and v."""
    bare, model = tiny("vit"), tiny("vit")
    adapters: dict[str, Any] = {**stirred(attach(model, "adapter_bias", share=share))}
    assert list(adapters) == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    tensors = {n: [a.token_weight.weight, a.token_weight.bias, a.vector] for n, a in adapters.items()}
    leaves: dict[int, Tensor] = {id(p): p.detach().clone().requires_grad_() for ps in tensors.values() for p in ps}
    assert len(leaves) == (4 if share else 6)

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = x + b.attn(b.norm1(x))
        w, c, v = (leaves[id(p)] for p in tensors[f"blocks.{depth}.mlp.fc2"])
        u = b.mlp.act(b.mlp.fc1(b.norm2(x)))
        shift = torch.stack([torch.stack([((token * w[0]).sum() + c[0]) * v for token in image]) for image in u])
        return x + b.mlp.fc2(u) + shift

    expected = blocks_written_out(bare, block, picture())
    got = model(picture())
    torch.testing.assert_close(got, expected)
    assert (expected - bare(picture())).abs().max() > 1e-3
    expected.square().sum().backward()
    got.square().sum().backward()
    for several in tensors.values():
        for p in several:
            torch.testing.assert_close(p.grad, leaves[id(p)].grad)


@pytest.mark.parametrize(
    ("host", "key"), [("diffusers_unet", "sd1"), ("diffusers_dit", "dit"), ("clip_text", "clip"), ("open_clip", "vit")]
)
def test_it_is_an_update_of_rank_one_and_of_the_bias(host: str, key: str) -> None:
    tuned = check_written_out(host, key, "adapter_bias", written)
    assert {site.role for site, _ in tuned.parts.values()} == {"mlp.out"}


def test_a_convolution_is_its_merged_kernel() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1).double()
    site = WeightSite(
        name="l",
        role="mlp.out",
        path="l",
        kind="conv",
        d_out=6,
        d_in=4,
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        dilation=(1, 1),
    )
    torch.manual_seed(0)
    adapter: Any = AdapterBias().build(site).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
        w, b = layer.weight, layer.bias
        dense = torch.nn.functional.conv2d(
            x,
            w + torch.einsum("o,ikl->oikl", adapter.vector, adapter.token.weight[0]),
            b + adapter.token.bias * adapter.vector,
            stride=2,
            padding=1,
        )
        torch.testing.assert_close(adapter.output(x, layer(x)), dense)
        torch.testing.assert_close(adapter.weight(w), w + torch.einsum("o,ikl->oikl", adapter.vector, adapter.token.weight[0]))


def test_strength_multiplies_the_change() -> None:
    torch.manual_seed(0)
    adapter: Any = AdapterBias().build(site_of()).double()
    with torch.no_grad():
        adapter.vector.normal_()
    x, y = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    weight, bias = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    whole = [adapter.output(x, y) - y, adapter.weight(weight) - weight, adapter.bias(bias, lambda: weight) - bias]
    adapter.strength.fill_(0.25)
    parts = [adapter.output(x, y) - y, adapter.weight(weight) - weight, adapter.bias(bias, lambda: weight) - bias]
    for part, all_of_it in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, all_of_it / 4)


def test_published_counts() -> None:
    """12·(3,072 + 1 + 768), and with shared weights 12·768 + 3,073."""
    with torch.device("meta"):
        for share, expected in ((False, 46_092), (True, 12_289)):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
            assert attach(vit, "adapter_bias", share=share).report().trainable == expected


def test_initial_values() -> None:
    """v zero; w and c uniform within 1 / sqrt(d_in)."""
    torch.manual_seed(0)
    adapter: Any = AdapterBias().build(site_of(d_in=4096))
    assert not adapter.vector.any()
    bound = 1 / 64
    assert bound * 0.99 < adapter.token.weight.abs().max() <= bound
    assert adapter.token.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert 0 < adapter.token.bias.abs() <= bound


def test_shared_weights_are_per_width() -> None:
    """Swin's stages have MLPs of several widths: one pair of w and c for each."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 2), img_size=56, num_classes=3
    )
    tuned = attach(model, "adapter_bias", share=True)
    widths = {site.d_in for site, _ in tuned.parts.values() if isinstance(site, WeightSite)}
    assert widths == {32, 64}
    assert tuned.report().trainable == 32 + 1 + 64 + 1 + 8 + 16


def test_where_it_cannot_merge_or_attach() -> None:
    """A layer without a bias has no place for c v. A grouped convolution is no site."""
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8), stem_width=8, num_classes=3).eval()
    tuned = attach(model, "adapter_bias", where="name:layer1.0.conv1")
    with raises(UnsupportedSite, site="layer1.0.conv1", given="AdapterBiasAdapter", expected="bias"):
        tuned.merge()
    convnext = timm.create_model("convnext_atto", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=3)
    with raises(SelectionError, pattern="conv.dw", given=()):
        attach(convnext, "adapter_bias", where="conv.dw")
