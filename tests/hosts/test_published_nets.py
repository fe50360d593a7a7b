"""Published Swin, ConvNeXt and convolutional networks on the meta device: every layer named, LoRA's counts from the tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.hosts.published import build
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import UnsupportedSite
from veneer.injection.sites import ParamSite, WeightSite
from veneer.injection.towers import sites

# torchvision publishes the same numbers; its SwinV2 has a bias of the keys as well, which is always zero
PARAMETERS = {
    "swin_b": 87_768_224,
    "swinv2_b": 87_930_848 - (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024),
    "convnext_b": 88_591_464,
    "resnet50": 25_557_032,
    "resnext50": 25_028_904,
    "efficientnet_b0": 5_288_548,
    "mobilenetv3": 5_483_032,
    "regnety_16": 11_202_430,
}
EVERY = [*PARAMETERS, "convnextv2_b", "efficientnet_lite0", "mobilenetv4"]
SWIN = 2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024  # channels of all blocks
CONVNEXT = 3 * 128 + 3 * 256 + 27 * 512 + 3 * 1024


def pair(d_in: int, d_out: int, kernel: int = 1) -> int:
    """Parameters of a pair of rank 1; of a depthwise layer, `d_in` is 1."""
    return d_in * kernel * kernel + d_out


def resnet50() -> int:
    total, d_in = pair(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        total += pair(d_in, 4 * width)
        for _ in range(blocks):
            total += pair(d_in, width) + pair(width, width, 3) + pair(width, 4 * width)
            d_in = 4 * width
    return total


def efficientnet_b0() -> int:
    """Table 1: expansion, channels, layers, kernel."""
    total, d_in = pair(3, 32, 3), 32
    for t, c, n, k in (1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5), (6, 192, 4, 5), (6, 320, 1, 3):
        for _ in range(n):
            expand = pair(d_in, t * d_in) if t > 1 else 0
            total, d_in = total + expand + pair(1, t * d_in, k) + pair(t * d_in, c), c
    return total + pair(320, 1280)


# model, selection, sites, parameters per rank
LORA = [
    ("swin_b", "attn.{q,v}", 48, 4 * SWIN),
    ("swin_b", "attn mlp", 144, (8 + 10) * SWIN),
    ("swinv2_b", "attn mlp", 144, (8 + 10) * SWIN),
    ("convnext_b", "mlp", 72, 10 * CONVNEXT),
    ("convnext_b", "conv.dw", 36, 36 * 49 + CONVNEXT),
    ("resnet50", "conv", 53, resnet50()),
    ("efficientnet_b0", "conv", 49, efficientnet_b0()),
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_model_is_the_published_one(name: str) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "where", "count", "parameters"), LORA)
def test_lora_takes_the_sites_and_parameters_that_the_tables_give(name: str, where: str, count: int, parameters: int) -> None:
    """Rank 7 divides by no number of groups, so that a depthwise layer has one pair on its flattened kernels."""
    tuned = attach(build(name), "lora", where=where, rank=7)
    assert (len(tuned.parts), tuned.report().trainable) == (count, 7 * parameters)
    assert sum(tuned.method.count(site) for site, _ in tuned.parts.values()) == 7 * parameters


@pytest.mark.parametrize("name", EVERY)
def test_every_layer_and_every_parameter_is_named(name: str) -> None:
    bare = build(name)
    layers = {n for n, m in bare.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))}
    found = [s for s in sites(bare) if isinstance(s, (WeightSite, ParamSite))]
    assert {s.path for s in found if isinstance(s, WeightSite)} == layers
    named = {f"{s.path}.{s.param}".removeprefix(".") for s in found}
    assert named == {n for n, _ in bare.named_parameters()}
    assert {s.role for s in found} & {"other", "bias.other"} == set()
    tuned = attach(bare, "lora", where="*", rank=1)
    assert {site.path for site, _ in tuned.parts.values()} == layers
    assert all(t.is_meta and torch.is_tensor(t) for t in tuned.state_dict().values())


@pytest.mark.parametrize(
    ("name", "blocks", "widths"), [("swin_b", 24, {128, 256, 512, 1024}), ("resnet50", 16, {256, 512, 1024, 2048})]
)
def test_streams_and_branches_of_every_block(name: str, blocks: int, widths: set[int]) -> None:
    found = sites(build(name))
    streams = [s for s in found if s.role == "block"]
    assert [s.depth for s in streams] == list(range(blocks))
    assert {s.width for s in streams} == widths
    branches = [s for s in found if s.role in ("attn", "conv", "mlp") and hasattr(s, "read")]
    assert len(branches) == (2 * blocks if name == "swin_b" else blocks - 4)


def test_windows_fix_the_number_of_tokens() -> None:
    with raises(UnsupportedSite, method="vpt", host="timm_swin", site="layers.0.blocks.0.tokens", given={"can_insert": False}):
        attach(build("swin_b"), "vpt")
