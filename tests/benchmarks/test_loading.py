"""The loading benchmark: complete files, and a transformer without weight memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from veneer.benchmarks.loading import contests, weightless
from veneer.benchmarks.shapes import SHAPES


def test_contenders_load_every_layer(tmp_path: Path) -> None:
    found = contests(SHAPES["tiny"], 2, tmp_path)
    assert [contest.name for contest in found] == ["load, diffusers", "load, kohya"]
    for contest in found:
        ways = {way.name: way for way in contest.contenders}
        assert {name for pair in contest.pairs for name in pair} == ways.keys()
        loaded = ways["veneer"].run(ways["veneer"].prepare())
        assert loaded.loaded.clean
        read = ways["safetensors"].run(None)
        assert all(tensor.dtype == torch.float32 for tensor in read.values())
        assert sum(p.numel() for p in loaded.parameters()) >= sum(t.numel() for k, t in read.items() if "alpha" not in k)


def test_diffusers_loads_the_same_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    contest = contests(SHAPES["tiny"], 2, tmp_path)[0]
    way = next(way for way in contest.contenders if way.name == "diffusers")
    model = way.prepare()
    way.run(model)
    layers = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules())
    assert f"for {layers} layers" in contest.what


def test_weights_take_no_memory() -> None:
    assert {p.untyped_storage().nbytes() for p in weightless(SHAPES["tiny"].flux).parameters()} == {2}
