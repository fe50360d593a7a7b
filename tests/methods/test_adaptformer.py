"""AdaptFormer: x' + MLP(LN(x')) + s·Up(ReLU(Down(x'))), against blocks that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import (
    blocks_written_out,
    branch,
    change,
    check_layouts,
    everywhere,
    picture,
    random,
    stirred,
    tiny,
    trained,
)
from tests.raising import raises
from veneer.injection import SelectionError, attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.adaptformer import AdaptFormer


def slow(adapter: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + adapter.scale * everywhere(lambda v: change(adapter, torch.relu, v), x)


@pytest.mark.parametrize("bias", [True, False])
def test_the_equation_in_every_layout(bias: bool) -> None:
    check_layouts(AdaptFormer(bottleneck=3, scale=0.7, bias=bias), branch, slow)


@pytest.mark.parametrize("key", ["vit", "deit_distilled", "vit_registers"])
def test_a_vit_with_the_papers_blocks(key: str) -> None:
    """x' = x + Attn(LN x); x' + MLP(LN x') + s·Up(ReLU(Down(x'))), from the stream before the norm."""
    bare, model = tiny(key), tiny(key)
    adapters = stirred(attach(model, "adaptformer", bottleneck=6))
    assert list(adapters) == ["blocks.0.mlp.branch", "blocks.1.mlp.branch"]

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = x + b.ls1(b.attn(b.norm1(x)))
        a: Any = adapters[f"blocks.{depth}.mlp.branch"]
        low = torch.relu(x @ a.down.T + a.down_bias)
        return x + b.ls2(b.mlp(b.norm2(x))) + 0.1 * (low @ a.up.T + a.up_bias)

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


def test_strength_multiplies_the_change() -> None:
    adapter, x, y = trained(AdaptFormer(bottleneck=3), branch()), random(2, 8, 5), random(2, 8, 5, seed=1)
    whole = adapter.output(x, y) - y
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(x, y) - y, whole / 4)


def test_published_counts() -> None:
    """1,189,632 with 64 and 156,768 with 8 features on ViT-B/16."""
    with torch.device("meta"):
        for width, expected in ((64, 1_189_632), (8, 156_768), (1, 27_660)):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
            assert attach(vit, "adaptformer", bottleneck=width).report().trainable == expected


def test_start() -> None:
    """Down uniform within sqrt(6 / (1 + 5) / width), the rest zero."""
    torch.manual_seed(0)
    adapter = AdaptFormer(bottleneck=256).build(branch(width=100))
    bound = math.sqrt(1 / 100)
    assert bound * 0.99 < adapter.down.abs().max() <= bound
    assert adapter.down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not any(p.any() for name, p in adapter.named_parameters() if name != "down")


def test_dropout_is_between_and_only_in_training() -> None:
    """Half of the features of Down are dropped, the others doubled: with one feature the change is 0 or doubled."""
    adapter = trained(AdaptFormer(bottleneck=1, dropout=0.5, bias=False), branch())
    x, y = random(4, 200, 5), torch.zeros(4, 200, 5, dtype=torch.float64)
    whole = adapter.output(x, y).detach()
    torch.manual_seed(0)
    dropped = adapter.train().output(x, y).detach()
    live = whole.abs().sum(-1) > 1e-9
    ratio = (dropped.sum(-1) / whole.sum(-1))[live]
    assert set(ratio.round(decimals=6).tolist()) == {0.0, 2.0}
    assert 0.4 < (ratio == 0).double().mean() < 0.6
    assert AdaptFormer().dropout == 0.1


@pytest.mark.parametrize(("option", "given"), [("bottleneck", 0), ("dropout", 1.0)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="adaptformer", option=option, given=given):
        AdaptFormer(**{option: given})


def test_a_host_without_mlp_branches_is_adapted_at_those_it_has() -> None:
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8), stem_width=8)
    assert {site.role for site, _ in attach(model, "adaptformer").parts.values()} == {"conv"}
    with raises(SelectionError, pattern="mlp", given=()):
        attach(model, "adaptformer", where="mlp")
