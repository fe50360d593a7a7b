"""The attaching benchmark: all contenders adapt the same layers."""

from __future__ import annotations

import pytest
from torch import nn

from veneer.benchmarks import peers
from veneer.benchmarks.attaching import contests
from veneer.benchmarks.shapes import SHAPES, flux

RANK = 2


def numbers(layers: list[nn.Linear]) -> int:
    return sum(RANK * (layer.in_features + layer.out_features) for layer in layers)


def test_contenders_have_equal_trainable_parameters() -> None:
    layers = {name: module for name, module in flux(SHAPES["tiny"].flux).named_modules() if isinstance(module, nn.Linear)}
    attention = [layer for name, layer in layers.items() if ".attn." in name]
    found = contests(SHAPES["tiny"], RANK)
    assert [contest.name for contest in found] == ["attach", "attach, all linears"]
    for contest, expected in zip(found, (attention, list(layers.values())), strict=True):
        for way in contest.contenders:
            model = way.prepare()
            way.run(model)
            assert peers.trained(model) == numbers(expected), way.name


def test_peft_is_compared_with() -> None:
    pytest.importorskip("peft")
    assert {pair for contest in contests(SHAPES["tiny"], RANK) for pair in contest.pairs} == {
        ("veneer", "peft"),
        ("veneer", "peft, low_cpu_mem_usage"),
    }
