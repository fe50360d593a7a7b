"""DTL against a forward pass with h written out block by block, and a convolution written out pixel by pixel."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.raising import raises
from veneer.injection import Attachment, HostChanged, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.registry import hosts
from veneer.methods.additive.side.dtl import DTL
from veneer.testing.case import perturb

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 10}


def vit(depth: int = 4, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **SHAPE, **options).double().eval()


def picture(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def stirred(model: nn.Module, **options: Any) -> Attachment:
    tuned = attach(model, "dtl", **options)
    perturb(tuned)
    return tuned


def swish(h: Tensor, beta: float) -> Tensor:
    return h * torch.sigmoid(beta * h)


def slow_depthwise(h: Tensor, weight: Tensor) -> Tensor:
    """out[i, j] = Σ_{a, b} w[a, b] h[i + a − before, j + b − before] for (B, H, W, C), zeros outside, `before` = (k − 1) // 2."""
    side = weight.shape[-1]
    before = (side - 1) // 2
    out = torch.zeros_like(h)
    for i in range(h.shape[1]):
        for j in range(h.shape[2]):
            for a in range(side):
                for b in range(side):
                    u, v = i + a - before, j + b - before
                    if 0 <= u < h.shape[1] and 0 <= v < h.shape[2]:
                        out[:, i, j] += h[:, u, v] * weight[:, 0, a, b]
    return out


def by_hand(
    model: Any, tuned: Attachment, x: Tensor, write_from: int, grid: tuple[int, int] = (4, 4), strength: float = 1.0
) -> Tensor:
    """The blocks of a ViT with h beside them."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    h, head = torch.zeros_like(x), model.num_prefix_tokens
    for i, block in enumerate(model.blocks):
        adapter = tuned.parts[f"blocks.{i}.stream"][1]
        h = h + (x @ adapter.A.T) @ adapter.B.T
        x = block(x)
        if i >= write_from:
            written = swish(h, adapter.beta)
            if adapter.shared.convs:
                patches = slow_depthwise(written[:, head:].unflatten(1, grid), adapter.shared.convs["0"])
                written = torch.cat([written[:, :head], patches.flatten(1, 2)], 1)
            x = x + strength * written
    return model.forward_head(model.norm(x))


def agrees(model: Any, tuned: Attachment, x: Tensor, **options: Any) -> None:
    got = model(x)
    with tuned.enabled(False):
        expected, bare = by_hand(model, tuned, x, **options), model(x)
    torch.testing.assert_close(got, expected)
    assert (expected - bare).abs().max() > 1e-3


@pytest.mark.parametrize("conv", [0, 3, 4, 5])
@pytest.mark.parametrize("extra", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_forward(conv: int, extra: dict[str, Any]) -> None:
    model = vit(**extra)
    agrees(model, stirred(model, conv=conv), picture(), write_from=2)


@pytest.mark.parametrize("write_from", [0, 1, 3])
def test_where_it_is_written_to(write_from: int) -> None:
    model = vit()
    agrees(model, stirred(model, write_from=write_from), picture(), write_from=write_from)


def test_rank_beta_and_strength() -> None:
    model = vit()
    tuned = stirred(model, rank=5, beta=3.0)
    agrees(model, tuned, picture(), write_from=2)
    tuned.scale = 0.3
    got = model(picture())
    with tuned.enabled(False):
        torch.testing.assert_close(got, by_hand(model, tuned, picture(), 2, strength=0.3))


def test_images_of_another_size() -> None:
    model = vit(dynamic_img_size=True)
    agrees(model, stirred(model, conv=3), picture(48, 48), write_from=2, grid=(6, 6))
    with raises(HostChanged, where="blocks.2.stream", given=24, expected=(4, 4)):
        model(picture(32, 48))


def test_gradients() -> None:
    model = vit()
    tuned = stirred(model, conv=3)
    parameters = [p for _, p in tuned.named_parameters()]
    got = torch.autograd.grad(model(picture()).square().sum(), parameters)
    with tuned.enabled(False):
        expected = torch.autograd.grad(by_hand(model, tuned, picture(), 2).square().sum(), parameters)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_in_swin_h_is_reset_in_each_stage() -> None:
    torch.manual_seed(0)
    shape = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
    model: Any = timm.create_model("swin_tiny_patch4_window7_224", **shape).double().eval()
    tuned = stirred(model, conv=3)
    got = model(picture())
    with tuned.enabled(False):
        x = model.patch_embed(picture())
        for i, stage in enumerate(model.layers):
            x = stage.downsample(x)
            h = torch.zeros_like(x)
            for j, block in enumerate(stage.blocks):
                adapter: Any = tuned.parts[f"layers.{i}.blocks.{j}.stream"][1]
                h = h + (x @ adapter.A.T) @ adapter.B.T
                x = block(x)
                if j == 1:
                    x = x + slow_depthwise(swish(h, 100.0), adapter.shared.convs[str(i)])
        torch.testing.assert_close(got, model.forward_head(model.norm(x)))


def test_channels_first() -> None:
    model: Any = hosts.get("timm_convnext")().tiny()["convnext"]().double()
    tuned = stirred(model, where=[f"name:stages.2.blocks.{j}.stream" for j in range(2)], write_from=0)
    picked = picture(64, 64)
    got = model(picked)
    with tuned.enabled(False):
        x = model.stem(picked)
        for i, stage in enumerate(model.stages):
            x = stage.downsample(x)
            h = torch.zeros_like(x)
            for j, block in enumerate(stage.blocks):
                before, x = x, block(x)
                if i == 2:
                    adapter: Any = tuned.parts[f"stages.2.blocks.{j}.stream"][1]
                    h = h + torch.einsum("bchw,rc,dr->bdhw", before, adapter.A, adapter.B)
                    x = x + swish(h, 100.0)
        torch.testing.assert_close(got, model.forward_head(model.norm_pre(x)))


def test_gradients_reach_the_blocks_after_the_first_write_only() -> None:
    """x of blocks 0 to M has no graph: nothing is trained before them. From M + 1 on it has."""
    model = vit(depth=6)
    tuned = attach(model, "dtl", write_from=3)
    on_path = {}
    handles = [
        block.register_forward_pre_hook(lambda module, args, i=i: on_path.__setitem__(i, args[0].requires_grad))
        for i, block in enumerate(model.blocks)
    ]
    model(picture())
    for handle in handles:
        handle.remove()
    assert on_path == {0: False, 1: False, 2: False, 3: False, 4: True, 5: True}
    assert len(tuned.parts) == 6


@pytest.mark.parametrize(("options", "count"), [({}, 36_864), ({"conv": 3}, 43_776), ({"conv": 5}, 56_064)])
def test_published_counts(options: dict[str, Any], count: int) -> None:
    """ViT-B/16: 12·2·768·2, and 768·k² once."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    tuned = attach(model, "dtl", **options)
    assert sum(p.numel() for p in tuned.parameters()) == count
    side: Any = tuned.parts["blocks.0.stream"][1].shared
    assert side.written == {f"blocks.{i}.stream" for i in range(6, 12)}


def test_start() -> None:
    model, bare = vit(), vit()
    tuned = attach(model, "dtl", conv=3)
    assert torch.equal(model(picture()), bare(picture()))
    adapter: Any = tuned.parts["blocks.0.stream"][1]
    assert not adapter.B.any()
    assert 0 < adapter.A.abs().max() <= 24**-0.5  # Kaiming-uniform with a = √5: bound 1/√fan_in


def test_blocks_that_change_width_or_grid_are_skipped() -> None:
    model: Any = hosts.get("timm_conv")().tiny()["resnet"]()
    blocks = {n: m for n, m in model.named_modules() if n.startswith("layer") and n.count(".") == 1}
    tuned = attach(model, "dtl")
    assert [site.path for site, _ in tuned.parts.values()] == [n for n, m in blocks.items() if m.downsample is None]
    assert 0 < len(tuned.parts) < len(blocks)


def test_rejections() -> None:
    with raises(OptionError, method="dtl", option="write_from", given=9, where="blocks.0.stream"):
        attach(vit(), "dtl", write_from=9)
    text = hosts.get("clip_text")()
    name = next(iter(text.tiny()))
    with raises(UnsupportedSite, method="dtl", option="conv", given=3):
        attach(text.tiny()[name](), "dtl", conv=3)


@pytest.mark.parametrize("options", [{"rank": 0}, {"beta": 0.0}, {"conv": 2}, {"conv": -1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    ((option, given),) = options.items()
    with raises(OptionError, method="dtl", option=option, given=given):
        DTL(**options)
