"""Tiny-attention adapter: attention with d features per head, against blocks that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.bottlenecks import blocks_written_out, branch, picture, random, stirred, tiny, trained
from tests.methods.dense import check_causal_text, loss_of, small_model
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.attention.tiny_attention import TinyAttention, average_heads


def attended(t: dict[str, Tensor], x: Tensor, causal: bool = False) -> Tensor:
    """The mean over heads, query by query, with explicit scores; t: the adapter's tensors by name."""
    images = []
    for tokens in x:
        heads = []
        for m in range(len(t["query"])):
            q, k, v = (
                tokens @ t[n][m].T + t.get(f"{n}_bias", torch.zeros(m + 1, 1).double())[m] for n in ("query", "key", "value")
            )
            rows = []
            for i, row in enumerate(q):
                seen = i + 1 if causal else len(k)
                scores = torch.softmax(torch.stack([(row * key).sum() for key in k[:seen]]) / math.sqrt(q.shape[1]), 0)
                rows.append(t["up"][m] @ (scores[:, None] * v[:seen]).sum(0))
            heads.append(torch.stack(rows))
        images.append(torch.stack(heads).mean(0) + t.get("up_bias", torch.zeros(1).double()))
    return torch.stack(images)


def leaves_of(adapter: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}


@pytest.mark.parametrize(("position", "bias"), [("parallel", False), ("sequential", True)])
def test_a_vit_written_out(position: str, bias: bool) -> None:
    """x + Attn(LN x) + A(LN x), or A of the attention's output; outputs and gradients."""
    bare, model = tiny("vit"), tiny("vit")
    adapters: dict[str, Any] = {**stirred(attach(model, "tiny_attention", heads=2, dim=2, position=position, bias=bias))}
    assert list(adapters) == ["blocks.0.attn.branch", "blocks.1.attn.branch"]
    leaves = {n: leaves_of(a) for n, a in adapters.items()}

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        normed = b.norm1(x)
        y = b.attn(normed)
        x = x + y + attended(leaves[f"blocks.{depth}.attn.branch"], normed if position == "parallel" else y)
        return x + b.mlp(b.norm2(x))

    image = picture()[:, :, :32, :32]
    expected, got = blocks_written_out(bare, block, image), model(image)
    torch.testing.assert_close(got, expected)
    assert (expected - bare(image)).abs().max() > 1e-3
    expected.square().sum().backward()
    got.square().sum().backward()
    for name, adapter in adapters.items():
        for n, p in adapter.named_parameters():
            torch.testing.assert_close(p.grad, leaves[name][n].grad, msg=lambda text, at=f"{name}.{n}": f"{at}: {text}")


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_text_towers_see_earlier_tokens_only(tower: str) -> None:
    adapter = trained(TinyAttention(heads=2, dim=3), branch(tower=tower))
    x, y = random(2, 6, 5), random(2, 6, 5, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(adapter.output(x, y), y + attended(dict(adapter.named_parameters()), x, tower == "text"))


def test_the_text_tower_of_a_clip_stays_causal() -> None:
    check_causal_text("tiny_attention")


def test_averaged_heads_have_the_mean_weights() -> None:
    """Equal heads: the same function with one head. Others: the mean of each weight."""
    model, single = tiny("vit"), tiny("vit")
    tuned, averaged = attach(model, "tiny_attention", heads=3, bias=True), attach(single, "tiny_attention", heads=1, bias=True)
    stirred(tuned)
    state = tuned.state_dict()
    averaged.load_state_dict(average_heads(state))
    (name,) = (
        n for n in averaged.state_dict() if n.endswith("blocks.1.attn.branch.key") or n.endswith("blocks.1.attn.branch:key")
    )
    torch.testing.assert_close(averaged.state_dict()[name][0], sum(state[name]) / 3)
    with torch.no_grad():
        assert (model(picture()) - single(picture())).abs().max() > 1e-6
        for _, adapter in tuned.parts.values():
            for p in adapter.parameters():
                if p.ndim > 1:
                    p.copy_(p[:1].clone().expand_as(p))
        averaged.load_state_dict(average_heads(tuned.state_dict()))
        torch.testing.assert_close(model(picture()), single(picture()))


def test_strength_multiplies_the_change() -> None:
    adapter, x, y = trained(TinyAttention(bias=True), branch()), random(2, 6, 5), random(2, 6, 5, seed=1)
    whole = adapter.output(x, y) - y
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(x, y) - y, whole / 4)


@pytest.mark.parametrize(("options", "expected"), [({"heads": 1}, 36_864), ({"heads": 1, "bias": True}, 46_116), ({}, 147_456)])
def test_counts(options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "tiny_attention", **options).report().trainable == expected


def test_initial_values() -> None:
    """O and all biases zero; the others uniform within 1 / sqrt(width)."""
    torch.manual_seed(0)
    adapter: Any = TinyAttention(heads=64, bias=True).build(branch(width=100))
    for name in ("query", "key", "value"):
        weight = getattr(adapter, name)
        assert 0.099 < weight.abs().max() <= 0.1
        assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
        assert not getattr(adapter, f"{name}_bias").any()
    assert not adapter.up.any()
    assert not adapter.up_bias.any()


@pytest.mark.parametrize(("option", "given"), [("heads", 0), ("dim", 0), ("position", "before")])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="tiny_attention", option=option, given=given):
        TinyAttention(**{option: given})


def test_models_without_such_branches_are_rejected() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 2), img_size=56)
    with raises(UnsupportedSite, method="tiny_attention"):
        attach(swin, "tiny_attention")


def test_a_branch_without_a_norm_port_is_read_before_the_norm() -> None:
    """In a text encoder: y + A(x) with x the stream, which the norm of the branch reads."""
    assert TinyAttention().build(branch()).input_port == "normed"
    assert TinyAttention(position="sequential").build(branch(normed=None)).input_port == "write"
    model, inputs = small_model("clip_text", "clip")
    explicit, _ = small_model("clip_text", "clip")
    tuned = attach(model, "tiny_attention", heads=2)
    stirred(tuned)
    assert len(tuned.parts) == 2
    for site, adapter in tuned.parts.values():
        streams: list[Tensor] = []
        block = explicit.get_submodule(f"encoder.layers.{site.depth}")
        t = {n: p.detach() for n, p in adapter.named_parameters()}
        block.layer_norm1.register_forward_pre_hook(lambda m, args, streams=streams: streams.append(args[0]))
        block.self_attn.register_forward_hook(
            lambda m, args, y, t=t, streams=streams: (y[0] + attended(t, streams.pop(), True), *y[1:])
        )
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model(**inputs)), loss_of(explicit(**inputs)))
