"""Pfeiffer's adapter, in both of its forms, against blocks that are written out."""

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
from veneer.methods.additive.bottleneck.pfeiffer import Pfeiffer


def test_the_equation_in_every_layout() -> None:
    """The adapter protocol passes the branch to `output` twice in one form, and the stream and the branch in the other."""
    check_layouts(Pfeiffer(reduction=2), branch, lambda a, x, y: y + everywhere(lambda v: change(a, torch.relu, v), x))
    check_layouts(
        Pfeiffer(reduction=2, input="sum"), branch, lambda a, x, y: y + everywhere(lambda v: change(a, torch.relu, v), x + y)
    )


@pytest.mark.parametrize("form", ["branch", "sum"])
@pytest.mark.parametrize("key", ["vit", "vit_registers"])
def test_a_vit_with_the_papers_blocks(form: Any, key: str) -> None:
    """x + y + A(y), or x + y + A(x + y), with y = MLP(LN x)."""
    bare, model = tiny(key), tiny(key)
    adapters = stirred(attach(model, "pfeiffer", reduction=4, input=form))
    assert list(adapters) == ["blocks.0.mlp.branch", "blocks.1.mlp.branch"]

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = x + b.ls1(b.attn(b.norm1(x)))
        y = b.ls2(b.mlp(b.norm2(x)))
        a: Any = adapters[f"blocks.{depth}.mlp.branch"]
        read = y if form == "branch" else x + y
        return x + y + torch.relu(read @ a.down.T + a.down_bias) @ a.up.T + a.up_bias

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


def test_counts_of_vit_b() -> None:
    """768 / 16 = 48 features: 12·(2·768·48 + 48 + 768)."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "pfeiffer").report().trainable == 12 * (2 * 768 * 48 + 48 + 768) == 894_528


def test_start() -> None:
    """Both matrices normal with 0.02; biases zero; at least one feature."""
    torch.manual_seed(0)
    adapter = Pfeiffer().build(branch(width=1024))
    for weight in (adapter.down, adapter.up):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(p.any() for name, p in adapter.named_parameters() if "bias" in name)
    assert len(Pfeiffer().build(branch(width=8)).down) == 1


@pytest.mark.parametrize(("option", "given"), [("reduction", 0), ("input", "norm")])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="pfeiffer", option=option, given=given):
        Pfeiffer(**{option: given})
