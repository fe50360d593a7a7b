"""The DoRA benchmark: equal trainable parameters, and the base's initial output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer.benchmarks import peers
from veneer.benchmarks.shapes import SHAPES, vit
from veneer.benchmarks.starting import contests

TINY = SHAPES["tiny"]
RANK = 2


def test_initial_output_equals_the_base() -> None:
    pytest.importorskip("timm")
    base = vit(TINY.large_vit, torch.float32, 0).eval()
    layers = [module for module in base.modules() if isinstance(module, nn.Linear)]
    expected = sum(RANK * (layer.in_features + layer.out_features) + layer.out_features for layer in layers)
    side = base.patch_embed.img_size[0]
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    (contest,) = contests(TINY, RANK, torch.float32, 0)
    assert f"{len(layers)} linear layers" in contest.what
    for way in contest.contenders:
        model = way.run(way.prepare())
        assert isinstance(model, nn.Module)
        assert peers.trained(model) == expected, way.name
        torch.testing.assert_close(model.eval()(x), base(x), rtol=1e-4, atol=1e-5)


def test_peft_is_compared_with() -> None:
    pytest.importorskip("peft")
    (contest,) = contests(TINY, RANK, torch.float32, 0)
    assert contest.pairs == (("veneer", "peft"),)
