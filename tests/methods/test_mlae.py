"""MLAE: sums over experts of rank 1, random masks in training, counts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.layers import site_of, trained
from tests.methods.weight_updates import check_update
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.reparameterized.low_rank.mlae import MLAE

MODELS = [("timm_vit", "vit", "attn.{q,v} mlp.in"), ("diffusers_unet", "sd1", "conv.res")]


def experts(adapter: Any, masks: Tensor, weight: Tensor) -> Tensor:
    """Σ_e m_e λ_e b_e a_eᵀ, expert by expert, each within its group."""
    change = torch.zeros_like(weight)
    each, height = adapter.up.shape[1], weight.shape[0] // adapter.pairs
    for e, mask in enumerate(masks):
        rows = slice(e // each * height, (e // each + 1) * height)
        column = adapter.up[rows, e % each].reshape(height, *[1] * (weight.ndim - 1))
        change[rows] = change[rows] + mask * adapter.values[e] * column * adapter.down[e]
    return change


@pytest.mark.parametrize(("host", "name", "where"), MODELS)
def test_all_experts_in_evaluation(host: str, name: str, where: str) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    check_update(host, name, MLAE(rank=3), lambda adapter, weight: experts(adapter, ones, weight), where)


@pytest.mark.parametrize("base", [nn.Linear(7, 6), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4)], ids=repr)
def test_masks_in_training(base: Any) -> None:
    """A mask for all rows and positions: each expert is left out or doubled, in both forms; merging has no mask."""
    base, site = base.double(), site_of(base)
    adapter: Any = trained(MLAE(rank=6, mask=0.5), site)
    whole = adapter.weight(base.weight)
    torch.testing.assert_close(whole, base.weight + experts(adapter, torch.ones(6), base.weight))
    x = torch.randn((3, 7) if site.kind == "linear" else (3, 4, 5, 6), dtype=torch.float64)
    adapter.train()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        masks = F.dropout(torch.ones(6, dtype=torch.float64), 0.5)
        seen.add(tuple(masks.tolist()))
        change = experts(adapter, masks, base.weight)
        torch.manual_seed(seed)
        torch.testing.assert_close(adapter.weight(base.weight), base.weight + change)
        torch.manual_seed(seed)
        y = torch.zeros_like(base(x))
        expected = F.linear(x, change) if site.kind == "linear" else F.conv2d(x, change, groups=site.groups)
        torch.testing.assert_close(adapter.output(x, y), expected)
    assert {value for masks in seen for value in masks} == {0.0, 2.0}
    left, right = adapter.factors()
    torch.testing.assert_close((left @ right).reshape(base.weight.shape), whole - base.weight)


def test_start_and_count() -> None:
    """λ = 1, b = 0, and 295,008 parameters on ViT-B/16's fused qkv."""
    torch.manual_seed(0)
    adapter = MLAE(rank=4, start=0.5).build(site_of(nn.Linear(100, 6)))
    assert adapter.values.tolist() == [0.5] * 4
    assert not adapter.up.any()
    assert 0.09 < adapter.down.abs().max() <= 0.1
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "mlae", where="attn.qkv").report().trainable == 295_008


@pytest.mark.parametrize(("option", "given"), [("rank", 0), ("mask", 1.0), ("start", 0)])
def test_bad_options(option: str, given: float) -> None:
    with raises(OptionError, method="mlae", option=option, given=given):
        MLAE(**{option: given})
