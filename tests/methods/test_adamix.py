"""AdaMix: y + Up_j(GELU(Down_i(y))) with sampled experts in training and their average otherwise, written out."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import gelu

import veneer
from tests.methods.bottlenecks import blocks_written_out, branch, check_layouts, everywhere, picture, random, stirred, tiny
from tests.raising import raises
from veneer.injection import StateError, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.experts._experts import sample_expert
from veneer.methods.additive.experts.adamix import AdaMix


def written_out(adapter: Any, i: int, j: int, y: Tensor) -> Tensor:
    """Experts i and j, or those that all share."""
    i, j = min(i, len(adapter.down) - 1), min(j, len(adapter.up) - 1)
    low = gelu(y @ adapter.down[i].T + adapter.down_bias[i])
    return y + low @ adapter.up[j].T + adapter.up_bias[j]


def average(adapter: Any, x: Tensor, y: Tensor) -> Tensor:
    down, up = adapter.down.mean(0), adapter.up.mean(0)
    low = lambda v: gelu(down @ v + adapter.down_bias.mean(0))  # noqa: E731
    return y + everywhere(lambda v: up @ low(v) + adapter.up_bias.mean(0), x)


@pytest.mark.parametrize("shared", [{}, {"share_down": True, "share_up": False}])
def test_the_average_of_the_experts_in_every_layout(shared: dict[str, bool]) -> None:
    check_layouts(
        AdaMix(bottleneck=3, experts=3, **shared), branch, lambda a, x, y: average(a, y, y) if x is y else average(a, x, y)
    )


def test_a_vit_with_the_sampled_experts_of_each_block() -> None:
    bare, model = tiny(), tiny()
    tuned = attach(model, "adamix", bottleneck=3, experts=3, share_up=False)
    adapters: dict[str, Any] = stirred(tuned)
    model.train()
    x = picture()
    for step, number in ((0, 0), (0, 1), (7, 0)):
        tuned.begin_pass(5, step, number)
        routes = {n: [sample_expert(3, 5, step, number, n, side) for side in (0, 1)] for n in adapters}

        def block(depth: int, b: Any, x: Tensor) -> Tensor:
            x = x + b.ls1(b.attn(b.norm1(x)))
            name = f"blocks.{depth}.mlp.branch"
            return x + written_out(adapters[name], *routes[name], b.ls2(b.mlp(b.norm2(x))))  # noqa: B023

        expected = blocks_written_out(bare, block, x)
        got = model(x)
        torch.testing.assert_close(got, expected)
        parameters = list(tuned.parameters())
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected)), strict=True):
            torch.testing.assert_close(one, other)


def test_experts_are_uniform_and_depend_on_every_argument() -> None:
    counts = Counter(sample_expert(4, 0, step, number, "a", side) for step in range(500) for number in (0, 1) for side in (0, 1))
    assert all(420 < counts[expert] < 580 for expert in range(4))
    runs = [
        [sample_expert(4, seed, step, number, site, side) for step in range(40)]
        for seed, number, site, side in ((0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1))
    ]
    assert len({*map(tuple, runs)}) == 5
    assert runs[0][:4] == [sample_expert(4, 0, step, 0, "a", 0) for step in range(4)]


def test_finalize_averages_once_and_the_file_is_one_bottleneck(tmp_path: Path) -> None:
    model = tiny()
    twin = copy.deepcopy(model)
    tuned = attach(model, "adamix", bottleneck=3, share_up=False, by_site={"mlp": {"experts": 2}})
    stirred(tuned)
    before = model.eval()(picture())
    assert tuned.method.passes == 2
    for _ in range(2):
        tuned.finalize()
        torch.testing.assert_close(model(picture()), before, rtol=0, atol=1e-12)
        assert {len(p) for p in tuned.parameters()} == {1}
        assert all(p.requires_grad for p in tuned.parameters())
    assert tuned.method == AdaMix(bottleneck=3, experts=1, share_up=False)
    assert tuned.method.passes == 1
    again = veneer.load(twin, tuned.save(tmp_path / "file"))
    assert torch.equal(twin.eval()(picture()), model(picture()))
    assert again.report().trainable == 2 * AdaMix(bottleneck=3, experts=1).count(branch(width=model.embed_dim))


def test_a_training_pass_without_sampled_experts_is_an_error() -> None:
    model = tiny()
    tuned = attach(model, "adamix", bottleneck=3)
    model.train()
    with raises(StateError, where="blocks.0.mlp.branch", given="training", expected="begin_pass"):
        model(picture())
    model.eval()(picture())
    tuned.merged = True  # no bottleneck can be merged: the state alone is checked
    with raises(StateError, where="adamix", given="merged"):
        tuned.finalize()


def test_experts_of_one_site_have_a_consistency_loss() -> None:
    """With one expert elsewhere; its weight holds for all sites, because it is a term of the output."""
    assert attach(tiny(), "adamix", experts=1, by_site={"mlp": {"experts": 2}}).method.passes == 2
    assert attach(tiny(), "adamix", experts=1).method.passes == 1
    with raises(UnsupportedSite, option="by_site", given=("consistency",)):
        attach(tiny(), "adamix", by_site={"mlp": {"consistency": 0.0}})


def test_published_counts() -> None:
    """747,264 in training, 304,320 of the average; ViT-B/16, 16 features, 4 experts of Down."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        tuned = attach(vit, "adamix")
        assert tuned.report().trainable == 747_264
        tuned.finalize()
        assert tuned.report().trainable == 304_320


def test_start() -> None:
    torch.manual_seed(0)
    adapter = AdaMix(bottleneck=64, share_up=False).build(branch(width=200))
    for name in ("down", "up"):
        stack = getattr(adapter, name)
        assert len(stack) == 4
        assert all(torch.equal(stack[0], expert) for expert in stack)
        assert stack[0].std().item() == pytest.approx(0.02, rel=0.03)
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    assert (
        AdaMix().consistency_loss([random(2), random(2, seed=1)], torch.sub).tolist() == (random(2) - random(2, seed=1)).tolist()
    )


@pytest.mark.parametrize(("option", "given"), [("bottleneck", 0), ("experts", 0), ("consistency", -1.0)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="adamix", option=option, given=given):
        AdaMix(**{option: given})
