"""CIAT: x + F(LN x) + A(LN x) for every branch and x + A(LN x) of the embeddings, against blocks that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.bottlenecks import branch, change, check_layouts, everywhere, picture, random, stirred, stream, tiny, trained
from tests.methods.dense import loss_of, small_model
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import BranchSite, Port, StreamSite
from veneer.methods.additive.bottleneck.ciat import CIAT


def bottleneck(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """Up(ReLU(Down(x))) with the adapter's tensors by name."""
    return torch.relu(x @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]


@pytest.mark.parametrize("norm", [True, False])
def test_a_vit_written_out(norm: bool) -> None:
    """Outputs and gradients: embedding, attention and MLP, each with its adapter."""
    bare: Any = tiny("vit_registers")
    model = tiny("vit_registers")
    tuned = attach(model, "ciat", bottleneck=6, embedding_bottleneck=4, embedding_norm=norm)
    adapters = stirred(tuned)
    names = [f"blocks.{d}.{kind}.branch" for d in (0, 1) for kind in ("attn", "mlp")]
    assert set(adapters) == {*names, "blocks.0.stream"}
    leaves = {
        a: {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()} for a, adapter in adapters.items()
    }
    t = leaves["blocks.0.stream"]
    assert t["down"].shape == (4, 24)
    x = bare.norm_pre(bare._pos_embed(bare.patch_embed(picture())))
    before = F.layer_norm(x, (24,), t["norm.weight"], t["norm.bias"], 1e-6) if norm else x
    x = x + bottleneck(t, before)
    for depth, b in enumerate(bare.blocks):
        for kind, ln, f, scale in (("attn", b.norm1, b.attn, b.ls1), ("mlp", b.norm2, b.mlp, b.ls2)):
            normed = ln(x)
            x = x + scale(f(normed)) + bottleneck(leaves[f"blocks.{depth}.{kind}.branch"], normed)
    expected, got = bare.forward_head(bare.norm(x)), model(picture())
    torch.testing.assert_close(got, expected)
    assert (expected - bare(picture())).abs().max() > 1e-3
    expected.square().sum().backward()
    got.square().sum().backward()
    for name, adapter in adapters.items():
        for n, p in adapter.named_parameters():
            torch.testing.assert_close(p.grad, leaves[name][n].grad, msg=lambda text, at=f"{name}.{n}": f"{at}: {text}")


def test_the_equation_in_every_layout() -> None:
    check_layouts(CIAT(bottleneck=3), branch, lambda a, x, y: y + everywhere(lambda v: change(a, torch.relu, v), x))


def test_strength_multiplies_the_change() -> None:
    adapter, x = trained(CIAT(bottleneck=3), stream()), random(2, 8, 5)
    whole = adapter.output(x, x) - x
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(x, x) - x, whole / 4)


@pytest.mark.parametrize(("norm", "expected"), [(False, 2_478_400), (True, 2_479_936)])
def test_counts(norm: bool, expected: int) -> None:
    """25·(2·768·64 + 64 + 768), and 2·768 for the norm."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "ciat", embedding_norm=norm).report().trainable == expected


def test_initial_values() -> None:
    """Down uniform within 1 / sqrt(width), the norm 1 and 0, the rest zero."""
    torch.manual_seed(0)
    for site in (branch(width=100), stream(width=100)):
        adapter: Any = CIAT(bottleneck=256).build(site)
        assert 0.099 < adapter.down.abs().max() <= 0.1
        assert adapter.down.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
        assert not any(p.any() for name, p in adapter.named_parameters() if name not in ("down", "norm.weight"))
    assert torch.equal(adapter.norm.weight, torch.ones(100))
    assert adapter.norm.eps == 1e-6


def test_dropout_is_between_and_only_in_training() -> None:
    adapter = trained(CIAT(bottleneck=1, dropout=0.5), branch())
    with torch.no_grad():
        adapter.up_bias.zero_()
    x, y = random(4, 200, 5), torch.zeros(4, 200, 5, dtype=torch.float64)
    whole = adapter.output(x, y).detach()
    torch.manual_seed(0)
    dropped = adapter.train().output(x, y).detach()
    live = whole.abs().sum(-1) > 1e-9
    assert set((dropped.sum(-1) / whole.sum(-1))[live].round(decimals=6).tolist()) == {0.0, 2.0}


def test_swin_has_an_adapter_of_its_embedding() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 2), img_size=56)
    tuned = attach(swin, "ciat", bottleneck=2)
    streams = [site for site, _ in tuned.parts.values() if isinstance(site, StreamSite)]
    assert [(site.depth, site.layout) for site in streams] == [(0, "NHWC")]


@pytest.mark.parametrize(("option", "given"), [("bottleneck", 0), ("dropout", 1.0), ("embedding_bottleneck", -1)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="ciat", option=option, given=given):
        CIAT(**{option: given})


def test_a_branch_without_a_norm_port_is_read_before_the_norm() -> None:
    """In a DiT and in a text encoder: y + A(x) with x the stream."""
    for host, key in (("diffusers_dit", "dit"), ("clip_text", "clip")):
        model, inputs = small_model(host, key)
        explicit, _ = small_model(host, key)
        tuned = attach(model, "ciat", bottleneck=3, where="mlp")
        stirred(tuned)
        for site, adapter in tuned.parts.values():
            assert isinstance(site, BranchSite)
            assert site.read.side == "in"
            streams: list[Tensor] = []
            tensors = {n: p.detach() for n, p in adapter.named_parameters()}
            read, write = explicit.get_submodule(site.read.path), explicit.get_submodule(site.write.path)
            port = Port(site.normed.path, "out") if site.normed else site.read
            module = explicit.get_submodule(port.path)
            if port.side == "out":
                module.register_forward_hook(lambda m, args, output, streams=streams: streams.append(output))
            else:
                read.register_forward_pre_hook(lambda m, args, streams=streams: streams.append(args[0]))
            write.register_forward_hook(lambda m, args, y, t=tensors, streams=streams: y + bottleneck(t, streams.pop()))
        with torch.no_grad():
            torch.testing.assert_close(loss_of(model(**inputs)), loss_of(explicit(**inputs)))
