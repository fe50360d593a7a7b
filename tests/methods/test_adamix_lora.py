"""AdaMix with LoRA: the weights W + s·B_j A_i of the sampled experts, or of their averages, put into a bare model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import veneer
from tests.methods.bottlenecks import picture, random, stirred, tiny
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.additive.experts._experts import sample_expert
from veneer.methods.reparameterized.low_rank.adamix_lora import AdaMixLoRA


def with_updates(bare: Any, updates: dict[str, Tensor]) -> nn.Module:
    """A copy with the updates of q and v added to the rows of the fused weight, differentiable in them."""
    model: Any = copy.deepcopy(bare)
    for depth, block in enumerate(model.blocks):
        weight = block.attn.qkv.weight.detach()
        width = len(weight) // 3
        q, v = (updates[f"blocks.{depth}.attn.{part}"] for part in "qv")
        del block.attn.qkv.weight
        block.attn.qkv.weight = weight + torch.cat([q, torch.zeros(width, width), v])
    return model


def test_a_vit_with_the_sampled_experts_and_with_their_averages() -> None:
    bare, model, x = tiny(), tiny(), picture()
    tuned = attach(model, "adamix_lora", rank=2, alpha=3.0, experts=3, share_up=False)
    adapters: dict[str, Any] = stirred(tuned)
    parameters = list(tuned.parameters())
    for step in (None, 0, 1):
        model.train(step is not None)
        if step is not None:
            tuned.begin_pass(5, step)
        updates = {}
        for name, a in adapters.items():
            i, j = [
                slice(None) if step is None else slice(k, k + 1)
                for k in (sample_expert(3, 5, step or 0, 0, name, s) for s in (0, 1))
            ]
            updates[name] = 1.5 * a.up[j].mean(0) @ a.down[i].mean(0)
        got, expected = model(x), with_updates(bare, updates)(x)
        torch.testing.assert_close(got, expected)
        assert (got - bare(x)).abs().max() > 1e-3
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("groups", "rank"), [(1, 4), (2, 4), (4, 3)])
def test_a_convolution_with_the_updated_kernel(groups: int, rank: int) -> None:
    site = WeightSite(
        name="conv", role="conv", path="conv", kind="conv", d_in=4, d_out=8, kernel=(3, 3), stride=(2, 2), padding=(1, 1),
        dilation=(1, 1), groups=groups,
    )  # fmt: skip
    adapter: Any = AdaMixLoRA(rank=rank, experts=3, share_down=True, share_up=False).build(site).double().eval()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    x, weight = random(2, 4, 6, 6), random(8, 4 // groups, 3, 3, seed=1)
    run = lambda w: nn.functional.conv2d(x, w, stride=2, padding=1, groups=groups)  # noqa: E731
    down, up = adapter.down.mean(0).flatten(1), adapter.up.mean(0).flatten(1)
    parts = groups if rank % groups == 0 else 1
    pairs = zip(up.chunk(parts), down.chunk(parts), strict=True)
    expected = run(weight + torch.cat([b @ a for b, a in pairs]).view(weight.shape))
    torch.testing.assert_close(adapter.output(x, run(weight)), expected)
    torch.testing.assert_close(run(adapter.weight(weight)), expected)
    left, right = adapter.factors()
    torch.testing.assert_close(run(weight + (left @ right).view(weight.shape)), expected)


def test_finalize_leaves_a_lora(tmp_path: Path) -> None:
    model = tiny()
    twin = copy.deepcopy(model)
    tuned = attach(model, "adamix_lora", rank=2, share_up=False)
    stirred(tuned)
    before = model.eval()(picture())
    for _ in range(2):
        tuned.finalize()
        torch.testing.assert_close(model(picture()), before, rtol=0, atol=1e-12)
    assert tuned.method == AdaMixLoRA(rank=2, experts=1, share_up=False)
    veneer.load(twin, tuned.save(tmp_path / "file"))
    assert torch.equal(twin(picture()), model(picture()))


def test_experts_of_one_site_have_a_consistency_loss() -> None:
    """With one expert elsewhere; its weight holds for all sites, because it is a term of the output."""
    assert attach(tiny(), "adamix_lora", experts=1, by_site={"attn.q": {"experts": 2}}).method.passes == 2
    assert attach(tiny(), "adamix_lora", experts=1).method.passes == 1
    with raises(UnsupportedSite, option="by_site", given=("consistency",)):
        attach(tiny(), "adamix_lora", by_site={"attn.q": {"consistency": 0.0}})


def test_counts() -> None:
    """4·768·8 + 8·768 at q and v of 12 blocks; of the averages as many as LoRA's."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        tuned = attach(vit, "adamix_lora")
        assert tuned.report().trainable == 737_280
        tuned.finalize()
        assert tuned.report().trainable == 294_912


def test_start() -> None:
    torch.manual_seed(0)
    site = WeightSite(name="q", role="attn.q", path="q", d_in=100, d_out=50)
    adapter = AdaMixLoRA(rank=64, share_up=False).build(site)
    assert all(torch.equal(adapter.down[0], expert) for expert in adapter.down)
    assert (adapter.down.shape, adapter.up.shape) == ((4, 64, 100), (4, 50, 64))
    assert adapter.down[0].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)
    assert not adapter.up.any()


@pytest.mark.parametrize(("option", "given"), [("rank", 0), ("dropout", 1.0), ("experts", 0), ("consistency", -1.0)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="adamix_lora", option=option, given=given):
        AdaMixLoRA(**{option: given})
