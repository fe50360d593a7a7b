"""Compacter: sums of Kronecker products with shared factors, on branches of every layout and a whole ViT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.bottlenecks import LAYOUTS, blocks_written_out, branch, laid_out, picture, random, stirred, tiny
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.compacter import Compacter


def bottleneck(adapter: Any, x: Tensor) -> Tensor:
    """Up(GELU(Down(x))) of features last, by torch's Kronecker product."""
    down, up = (
        sum(torch.kron(rule, left @ right) for rule, left, right in zip(adapter.shared.rules, *pair, strict=True))
        for pair in ((adapter.down_left, adapter.down_right), (adapter.up_left, adapter.up_right))
    )
    return F.gelu(x @ down + adapter.down_bias, approximate="tanh") @ up + adapter.up_bias


@pytest.mark.parametrize("options", [{}, {"order": 2, "rank": 3}], ids=str)
def test_a_branch_in_every_layout(options: dict[str, Any]) -> None:
    method = Compacter(bottleneck=8, **options)
    tokens, images = random(2, 2, 12, seed=1), random(2, 2, 3, 12, seed=3)
    for layout in LAYOUTS:
        site = branch(layout, width=12)
        torch.manual_seed(0)
        adapter = method.build(site)
        adapter.shared = method.build_shared([site])
        adapter.double()
        for p in adapter.parameters():
            torch.nn.init.normal_(p)
        adapter.strength.fill_(0.5)
        y = laid_out(images, tokens, layout)
        expected = laid_out(*(t + 0.5 * bottleneck(adapter, t) for t in (images, tokens)), layout)
        got = adapter.output(y, y)
        torch.testing.assert_close(got, expected)
        weights = torch.randn_like(got)
        mine = torch.autograd.grad((got * weights).sum(), list(adapter.parameters()))
        theirs = torch.autograd.grad((expected * weights).sum(), list(adapter.parameters()))
        torch.testing.assert_close(mine, theirs)


def test_a_vit_written_out() -> None:
    """After attention and MLP of every block, with the same rules in all."""
    bare, model = tiny(), tiny()
    tuned = attach(model, Compacter(bottleneck=8, std=0.5))
    adapters = stirred(tuned)

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        for name, branch_of in (("attn", lambda t: b.ls1(b.attn(b.norm1(t)))), ("mlp", lambda t: b.ls2(b.mlp(b.norm2(t))))):
            y = branch_of(x)
            x = x + y + bottleneck(adapters[f"blocks.{depth}.{name}.branch"], y)
        return x

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3
    assert len({id(adapter.shared) for adapter in adapters.values()}) == 1
    assert len(list(tuned.parameters())) == 6 * len(adapters) + 1


def test_start() -> None:
    """Factors are Xavier-uniform with gain sqrt 2, rules normal with 1e-4, biases zero."""
    torch.manual_seed(0)
    method, site = Compacter(bottleneck=96), branch(width=768)
    adapter = method.build(site)
    for factors, sides in ((adapter.down_left, 193), (adapter.down_right, 25), (adapter.up_left, 25), (adapter.up_right, 193)):
        bound = math.sqrt(2 * 6 / sides)
        assert 0.9 * bound < factors.abs().max() <= bound
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    assert Compacter(order=12).build_shared([site]).rules.std().item() == pytest.approx(1e-4, rel=0.1)


def test_published_counts() -> None:
    """57,088 on ViT-B/16, and 28,576 for Compacter++."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    for where, expected in ((None, 57_088), ("mlp", 28_576)):
        tuned = attach(vit, "compacter", where=where)
        assert tuned.report().trainable == expected
        tuned.detach()


@pytest.mark.parametrize(("option", "given"), [("bottleneck", 0), ("bottleneck", 6), ("order", 0), ("rank", 0), ("std", 0.0)])
def test_bad_options(option: str, given: float) -> None:
    with raises(OptionError, method="compacter", option=option, given=given):
        Compacter(**{option: given})


def test_the_order_divides_the_width() -> None:
    with raises(OptionError, method="compacter", option="order", given=4, expected=10):
        Compacter().build(branch(width=10))
