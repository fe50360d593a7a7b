"""Houlsby's adapters: y + Up(GELU(Down(y))) on both branches, against blocks that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import blocks_written_out, branch, change, check_layouts, everywhere, picture, stirred, tiny
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.houlsby import Houlsby


def gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / 2**0.5)) / 2


def test_the_equation_in_every_layout() -> None:
    """The adapter protocol passes the branch to `output` twice; here its input and the sum are distinguished."""
    check_layouts(Houlsby(bottleneck=3), branch, lambda a, x, y: y + everywhere(lambda v: change(a, gelu, v), x))


@pytest.mark.parametrize("key", ["vit", "vit_registers"])
def test_a_vit_with_the_papers_blocks(key: str) -> None:
    """x + A(Attn(LN x)), then x + A(MLP(LN x)), with A(y) = y + Up(GELU(Down(y))); layer scale belongs to the branch."""
    bare, model = tiny(key), tiny(key)
    adapters = stirred(attach(model, "houlsby", bottleneck=6))
    assert len(adapters) == 4

    def after(depth: int, kind: str, y: Tensor) -> Tensor:
        a: Any = adapters[f"blocks.{depth}.{kind}.branch"]
        return y + gelu(y @ a.down.T + a.down_bias) @ a.up.T + a.up_bias

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = x + after(depth, "attn", b.ls1(b.attn(b.norm1(x))))
        return x + after(depth, "mlp", b.ls2(b.mlp(b.norm2(x))))

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


def test_counts_of_vit_b() -> None:
    """Two of 2·768·h + h + 768 in each of twelve blocks."""
    with torch.device("meta"):
        for width in (8, 64):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
            assert attach(vit, "houlsby", bottleneck=width).report().trainable == 24 * (2 * 768 * width + width + 768)


def test_start() -> None:
    """Both matrices normal with 0.01, truncated at 0.02; biases zero."""
    torch.manual_seed(0)
    adapter = Houlsby(bottleneck=128).build(branch(width=256))
    for weight in (adapter.down, adapter.up):
        assert 0.0195 < weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.0088, rel=0.03)  # of a normal cut at two deviations: 0.880 of it
    assert adapter.down_bias is not None
    assert adapter.up_bias is not None
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()


@pytest.mark.parametrize(("option", "given"), [("bottleneck", -1), ("std", 0.0)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="houlsby", option=option, given=given):
        Houlsby(**{option: given})
