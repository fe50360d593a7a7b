"""Adapter+: x + c ∘ DropPath(Up(GELU(Down(x)))) after every block, against blocks that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.bottlenecks import (
    WIDTH,
    blocks_written_out,
    change,
    check_layouts,
    everywhere,
    picture,
    random,
    stirred,
    stream,
    tiny,
    trained,
)
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.adapter_plus import AdapterPlus


def test_the_equation_in_every_layout() -> None:
    check_layouts(
        AdapterPlus(bottleneck=3),
        stream,
        lambda a, x, y: y + everywhere(lambda v: a.channel_scale * change(a, F.gelu, v), x),
    )


@pytest.mark.parametrize("key", ["vit", "vit_registers"])
def test_a_vit_with_the_papers_blocks(key: str) -> None:
    bare, model = tiny(key), tiny(key)
    adapters = stirred(attach(model, "adapter_plus", bottleneck=6))
    assert list(adapters) == ["blocks.0.stream", "blocks.1.stream"]

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x, a = b(x), adapters[f"blocks.{depth}.stream"]
        return x + a.channel_scale * (F.gelu(x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["NLC", "NHWC", "NCHW"])
def test_drop_path_drops_whole_samples_in_training(layout: str) -> None:
    """Each sample has no change, or 1 / (1 − p) of it, including the bias."""
    adapter = trained(AdapterPlus(bottleneck=3, drop_path=0.25), stream(layout))
    shape = {"NLC": (400, 6, WIDTH), "NHWC": (400, 2, 3, WIDTH), "NCHW": (400, WIDTH, 2, 3)}[layout]
    x = random(*shape)
    whole = adapter.output(x, x).detach() - x
    torch.manual_seed(0)
    got = adapter.train().output(x, x).detach() - x
    left_out = got.flatten(1).abs().amax(1) < 1e-12
    torch.testing.assert_close(got[~left_out], whole[~left_out] / 0.75)
    assert 0.17 < left_out.double().mean() < 0.33
    assert AdapterPlus().drop_path == 0.1


@pytest.mark.parametrize(
    ("width", "expected"), [(1, 36_876), (2, 55_320), (4, 92_208), (8, 165_984), (16, 313_536), (32, 608_640)]
)
def test_published_counts(width: int, expected: int) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "adapter_plus", bottleneck=width).report().trainable == expected


def test_start() -> None:
    """Both matrices normal with 0.01, truncated at 0.02; biases zero, scales one."""
    torch.manual_seed(0)
    adapter = AdapterPlus(bottleneck=128).build(stream(width=256))
    for weight in (adapter.down, adapter.up):
        assert 0.0195 < weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.0088, rel=0.03)  # of a normal cut at two deviations: 0.880 of it
    assert not any(p.any() for name, p in adapter.named_parameters() if "bias" in name)
    assert torch.equal(adapter.channel_scale, torch.ones(256))


@pytest.mark.parametrize(("option", "given"), [("bottleneck", 0), ("drop_path", -0.1), ("std", -1.0)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="adapter_plus", option=option, given=given):
        AdapterPlus(**{option: given})
