"""Contenders of the freezing benchmark: what each of them trains."""

from __future__ import annotations

import timm
import torch

from tests.raising import raises
from veneer.benchmarks import freezing
from veneer.benchmarks.shapes import SHAPES
from veneer.injection import OptionError, attach


def test_contests_are_against_full() -> None:
    both = freezing.contests(SHAPES["tiny"], torch.float32, 0)
    assert [contest.unit for contest in both] == ["s", "MB"]
    for contest in both:
        assert [way.name for way in contest.contenders] == ["full", *freezing.PARTS]
        assert contest.pairs == tuple((name, "full") for name in freezing.PARTS)


def test_the_frozen_part_is_not_trained() -> None:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}
    base = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    for part, count in ((0.0, 0), (0.5, 2), (0.75, 3)):
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
        tuned = attach(model, "autofreeze")
        freezing.freeze(tuned, part)
        depths = {site.depth for site, adapter in tuned.parts.values() if next(adapter.parameters()).requires_grad}
        assert depths == {None, *range(count, 4)}
        trained = [n for n, (_, adapter) in tuned.parts.items() if next(adapter.parameters()).requires_grad]
        assert any("patch_embed" in name for name in trained) == (count == 0)
        assert any("head" in name for name in trained)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for run in freezing.steps(base, images, labels).values():
        assert run(None) != run(None)


def test_a_model_without_blocks_is_an_error() -> None:
    tuned = attach(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1), "full", where="head")
    with raises(OptionError, option="model", given=0):
        freezing.freeze(tuned, 0.5)
