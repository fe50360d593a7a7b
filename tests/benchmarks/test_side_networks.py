"""Contenders of the side network benchmark: trainable parameters, and the order of their peak memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import timm
import torch

from veneer.benchmarks import side_networks
from veneer.benchmarks.interleaved_timing import Contender, Contest, interleave
from veneer.benchmarks.shapes import SHAPES

RANK = 4


@pytest.fixture(scope="module")
def found() -> dict[str, Contest]:
    return {contest.name: contest for contest in side_networks.contests(SHAPES["tiny"], RANK, torch.float32, 0)}


def test_time_and_memory_of_each_against_lora(found: dict[str, Contest]) -> None:
    assert [contest.unit for contest in found.values()] == ["s", "MB"]
    for contest in found.values():
        assert [way.name for way in contest.contenders] == ["lora", "lst", "dtl", "linear probe", "full"]
        assert contest.pairs == tuple((name, "lora") for name in ("lst", "dtl", "linear probe", "full"))


def test_contenders_train_their_own_parameters() -> None:
    base = timm.create_model("test_vit").requires_grad_(False)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    models = side_networks.models(base, RANK)
    trained = {name: [key for key, p in model.named_parameters() if p.requires_grad] for name, model in models.items()}
    assert trained["linear probe"] == ["head.weight", "head.bias"]
    assert trained["full"] == list(before)
    for name in ("lora", "lst", "dtl"):
        assert trained[name]
        assert all("veneer_" in key for key in trained[name])
    pictures = torch.randn(2, 3, *base.patch_embed.img_size)
    for model in models.values():
        run = side_networks.step(model, pictures, torch.tensor([0, 1]))
        assert run(None) != run(None)
    for name, t in base.state_dict().items():
        assert torch.equal(t, before[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is weighed on the device, where blocks are rounded")
def test_peak_memory_is_ordered_by_saved_activations() -> None:
    """A deep, narrow ViT: no activations, one tensor per block, that and the upper half of the blocks, all blocks."""
    torch.manual_seed(0)
    base = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=64, depth=12, num_heads=4)
    pictures, labels = torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)
    models = side_networks.models(base.requires_grad_(False), RANK)
    ways = tuple(Contender(n, side_networks.step(m, pictures, labels)) for n, m in models.items() if n != "full")
    values = interleave(Contest("memory", "", ways, (), unit="MB"), rounds=1).values()
    order = [values[name] for name in ("linear probe", "lst", "dtl", "lora")]
    assert all(a < b for a, b in pairwise(order)), values
    tokens = 4 * 65 * 64 * 4 / 1e6  # MB of one tensor of the stream
    assert values["lora"] - values["linear probe"] > 11 * 10 * tokens
    assert values["dtl"] - values["linear probe"] < 0.5 * (values["lora"] - values["linear probe"]) + 12 * tokens
