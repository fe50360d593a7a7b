"""The starting benchmark: both contenders train the same numbers, and begin as the base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer.benchmarks import peers
from veneer.benchmarks.starting import contests, vit

TINY = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
RANK = 2


def test_both_begin_as_the_base_on_every_linear_layer() -> None:
    pytest.importorskip("timm")
    base = vit("vit_tiny_patch16_224", **TINY).eval()
    layers = [module for module in base.modules() if isinstance(module, nn.Linear)]
    expected = sum(RANK * (layer.in_features + layer.out_features) + layer.out_features for layer in layers)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (contest,) = contests(RANK, "vit_tiny_patch16_224", **TINY)
    assert f"{len(layers)} linear layers" in contest.what
    for way in contest.contenders:
        model = way.run(way.prepare())
        assert isinstance(model, nn.Module)
        assert peers.trained(model) == expected, way.name
        torch.testing.assert_close(model.eval()(x), base(x), rtol=1e-4, atol=1e-5)


def test_peft_is_compared_with() -> None:
    pytest.importorskip("peft")
    (contest,) = contests(RANK, "vit_tiny_patch16_224", **TINY)
    assert contest.pairs == (("veneer", "peft"),)
