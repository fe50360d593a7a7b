"""Contenders of the benchmark of conditional adapters, and the operations that they count."""

from __future__ import annotations

import timm
import torch

from veneer.benchmarks import conditional
from veneer.benchmarks.shapes import SHAPES


def test_contests_of_a_forward_pass_and_a_step() -> None:
    passes, steps = conditional.contests(SHAPES["tiny"], 4, torch.float32, 0)
    assert "GFLOP: adaptformer" in passes.what
    for contest in (passes, steps):
        assert [way.name for way in contest.contenders] == ["adaptformer", "coda 0.5", "coda 0.25"]
        assert contest.pairs == (("coda 0.5", "adaptformer"), ("coda 0.25", "adaptformer"))
        for way in contest.contenders:
            way.run(None)


def test_operations_of_a_block_are_those_of_its_tokens() -> None:
    """Layers and attention of a block for the class token and 16 or 8 of 16 patches, written out, without the router."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
    base = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **options).eval().requires_grad_(False)
    images = torch.randn(1, 3, 32, 32)
    whole, half = (conditional.flops(model, images) for model in list(conditional.models(base, 4).values())[:2])

    def block(n: int) -> int:
        return 2 * n * 24 * (3 * 24 + 24 + 2 * 4 * 24) + 2 * 2 * n * n * 24

    outside = 2 * 16 * 24 * 3 * 64 + 2 * 24 * 10
    bottleneck = 2 * 17 * 24 * 4 * 2
    assert whole == outside + 2 * (block(17) + bottleneck)
    assert half == outside + 2 * (block(9) + bottleneck)
