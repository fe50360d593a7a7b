"""LST against a side network written out step by step, and its memory for the backward pass against a sum of its tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.raising import raises
from veneer.injection import Attachment, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.registry import hosts
from veneer.methods.additive.side.lst import LST
from veneer.testing.case import perturb

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 10}
TOKENS = 17


def vit(depth: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **SHAPE, **options).double().eval()


def picture() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def stirred(model: nn.Module, **options: Any) -> Attachment:
    tuned = attach(model, "lst", **{"reduction": 4, **options})
    perturb(tuned)
    return tuned


def norm(x: Tensor, layer: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def affine(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.T + layer.bias


def side_block(s: Tensor, block: Any, heads: int) -> Tensor:
    """Attention head by head, then the MLP."""
    n = norm(s, block.norm1)
    w = s.shape[-1]
    rows = [affine(n, block.qkv)[..., i * w : (i + 1) * w] for i in range(3)]
    found = []
    for q, k, v in zip(*(each.split(w // heads, -1) for each in rows), strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(w // heads)
        found.append(scores.softmax(-1) @ v)
    s = s + affine(torch.cat(found, -1), block.proj)
    z = affine(norm(s, block.norm2), block.fc1)
    return s + affine(z * 0.5 * (1 + torch.erf(z / math.sqrt(2))), block.fc2)


def by_hand(model: Any, tuned: Attachment, x: Tensor, heads: int, skip: tuple[int, ...] = (), strength: float = 1.0) -> Tensor:
    """The backbone without a graph, and the side network beside it."""
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    adapters: list[Any] = [tuned.parts[f"blocks.{i}.stream"][1] for i in range(len(model.blocks))]
    ends = adapters[0].shared.ends["0"]
    s = affine(x, ends.down)
    for i, (block, adapter) in enumerate(zip(model.blocks, adapters, strict=True)):
        with torch.no_grad():
            x = block(x)
        if i not in skip:
            gate = 1 / (1 + torch.exp(-adapter.alpha / adapter.temperature))
            s = side_block(gate * s + (1 - gate) * affine(x, adapter.down), adapter.block, heads)
    after = affine(norm(s, ends.norm), ends.up)
    return model.forward_head(model.norm(x + strength * (after - x)))


@pytest.mark.parametrize("extra", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("options", [{}, {"reduction": 2, "temperature": 1.0}, {"skip": (0, 3)}, {"skip": (1, 2)}, {"heads": 3}])
def test_forward_and_gradients(extra: dict[str, Any], options: dict[str, Any]) -> None:
    model = vit(**extra)
    tuned = stirred(model, **options)
    side = 24 // options.get("reduction", 4)
    heads = next(a.block.heads for _, a in tuned.parts.values() if hasattr(a, "block"))
    assert side % heads == 0
    assert heads == options.get("heads", heads)
    assert heads > 1 or side < 32
    parameters = list(tuned.parameters())
    got = model(picture())
    grads = torch.autograd.grad(got.square().sum(), parameters)
    with tuned.enabled(False):
        expected = by_hand(model, tuned, picture(), heads, options.get("skip", ()))
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(got, expected)
    for mine, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_strength() -> None:
    model = vit()
    tuned = stirred(model)
    tuned.scale = 0.3
    got = model(picture())
    with tuned.enabled(False):
        heads = tuned.parts["blocks.0.stream"][1].block.heads
        torch.testing.assert_close(got, by_hand(model, tuned, picture(), heads, strength=0.3))


def test_heads_are_as_many_as_the_backbone_s() -> None:
    """ViT-B/16 has 12 heads of 64 channels: 12 side heads of 8. A width that 8 does not divide takes the next lower divisor."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert attach(model, "lst").parts["blocks.0.stream"][1].block.heads == 12
    assert attach(model, "lst", reduction=9, name="nine").parts["blocks.0.stream"][1].block.heads == 17  # 85 = 17 · 5


def test_published_count() -> None:
    """ViT-B/16, w = 96: 12 blocks of 12·w² + 13·w, Down of 769·w and a gate; Down_0, norm and Up once. V-PETL says 2.38 M."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    w, d = 96, 768
    block = 2 * 2 * w + (w + 1) * 3 * w + (w + 1) * w + (w + 1) * 4 * w + (4 * w + 1) * w
    expected = 12 * (block + (d + 1) * w + 1) + (d + 1) * w + 2 * w + (w + 1) * d
    assert sum(p.numel() for p in attach(model, "lst").parameters()) == expected == 2_376_492
    assert round(expected / 1e6, 2) == 2.38


class Kept:
    """Every tensor kept for the backward pass, without parameters, once per storage."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.found: dict[int, Tensor] = {}

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *what: object) -> None:
        self.hooks.__exit__(*what)

    def _pack(self, t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in self.own:
            self.found.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    @property
    def numbers(self) -> int:
        return sum(t.untyped_storage().nbytes() // t.element_size() for t in self.found.values())


def test_of_the_backbone_the_taps_alone_are_kept() -> None:
    """x_0 and y_i of each block, (tokens, width): no scores, no queries, no MLP of the backbone, whose tensors have d, 3d or 4d
    channels or d / heads a head. Beside them is the side network, of w, 3w, 4w and w / heads: w = 12 and one head of 12.
    """
    model = vit(depth=5)
    attach(model, "lst", reduction=2)
    with Kept(model) as kept:
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(picture())))
        for block in model.blocks:
            tokens = block(tokens)
    frozen = [t for t in kept.found.values() if not t.requires_grad and t.numel() > 2 * TOKENS]  # not one number a token
    assert [(t.numel(), t.shape[-1]) for t in frozen] == [(2 * TOKENS * 24, 24)] * (5 + 1)
    assert {t.shape[-1] for t in kept.found.values() if t.requires_grad} == {1, 12, 48}
    assert tokens.requires_grad


def test_it_keeps_far_less_than_lora_does() -> None:
    """LST, a token: taps of d; a side block of under 20·w channels and 16 values of its norms and attention; the end of the
    side network, the last norm and the head with under 4·d. LoRA must keep what a block of d channels needs to pass gradients
    on: the inputs of both norms, queries, keys, values, the attention's output and the MLP's 4·d in front of GELU, 10·d a block.
    """
    numbers = {}
    for method, options in (("lst", {"reduction": 8}), ("lora", {"where": "attn.q"})):
        model = timm.create_model("vit_tiny_patch16_224", depth=6, **{**SHAPE, "embed_dim": 64}).double().eval()
        attach(model, method, **options)
        with Kept(model) as kept:
            model(picture())
        numbers[method] = kept.numbers
    d, w, blocks, rows = 64, 8, 6, 2 * TOKENS
    most = rows * ((blocks + 1) * d + blocks * (20 * w + 16) + 4 * d)
    least = rows * (blocks - 1) * 10 * d
    assert numbers["lst"] < most < least < numbers["lora"]


def test_no_gradient_passes_through_a_block() -> None:
    model = vit()
    stirred(model)
    entered = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: entered.append(args[0].requires_grad))
    model(picture())
    assert entered == [False] * 4


def test_the_selected_blocks_make_the_ladder() -> None:
    model = vit()
    tuned = stirred(model, where="block@2:4")
    assert list(tuned.parts) == ["blocks.2.stream", "blocks.3.stream"]
    got = model(picture())
    with tuned.enabled(False), torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(picture())))
        x = model.blocks[1](model.blocks[0](x))
        adapters: list[Any] = [a for _, a in tuned.parts.values()]
        s = affine(x, adapters[0].shared.ends["0"].down)
        for block, adapter in zip(model.blocks[2:], adapters, strict=True):
            x = block(x)
            gate = torch.sigmoid(adapter.alpha / 0.1)
            s = side_block(gate * s + (1 - gate) * affine(x, adapter.down), adapter.block, adapter.block.heads)
        ends = adapters[0].shared.ends["0"]
        torch.testing.assert_close(got, model.forward_head(model.norm(affine(norm(s, ends.norm), ends.up))))


@pytest.mark.parametrize(("host", "model"), [("timm_swin", "swin"), ("timm_convnext", "convnext"), ("diffusers_unet", "sd1")])
def test_towers_in_stages_are_rejected(host: str, model: str) -> None:
    with raises(UnsupportedSite, method="lst", host=host):
        attach(hosts.get(host)().tiny()[model](), "lst", reduction=2)


def test_a_side_network_of_zero_width_is_rejected() -> None:
    with raises(OptionError, method="lst", where="blocks.0.stream", option="reduction", given=32, expected=24):
        attach(vit(), "lst", reduction=32)


def test_heads_that_do_not_divide_the_side_are_rejected() -> None:
    """The authors have the backbone's number, here 2 of 6 channels; 5 do not divide 6."""
    assert attach(vit(), "lst", reduction=4, heads=2).parts["blocks.0.stream"][1].block.heads == 2
    with raises(OptionError, method="lst", where="blocks.0.stream", option="heads", given=5, expected=6):
        attach(vit(), "lst", reduction=4, heads=5)


@pytest.mark.parametrize("options", [{"reduction": 0}, {"temperature": 0.0}, {"heads": -1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="lst", option=option, given=given):
        LST(**options)


def test_taps_pass_no_gradient_to_what_is_trained_in_front() -> None:
    """LoRA in the blocks: it affects the output only through the taps, or at half strength through y as well."""
    model = vit()
    lora = attach(model, "lora", where="attn.q")
    perturb(lora)
    tuned = stirred(model)
    with tuned.enabled(False):
        bare = model(picture())
    assert not torch.equal(model(picture()), bare)
    inside = list(lora.parameters())
    assert not any(g.any() for g in torch.autograd.grad(model(picture()).sum(), inside))
    tuned.scale = 0.5
    assert all(g.any() for g in torch.autograd.grad(model(picture()).sum(), inside))
