"""Convpass: y + s·Up(act(conv(act(Down(LN x))))), against loops over pixels and blocks that are written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.bottlenecks import (
    GRID,
    PREFIX,
    blocks_written_out,
    branch,
    check_layouts,
    everywhere,
    picture,
    random,
    stirred,
    tiny,
    trained,
)
from tests.raising import raises
from veneer.injection import HostChanged, UnsupportedSite, attach
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.convpass import Convpass


def act(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-1.702 * z))


def convolved(adapter: Any, z: Tensor) -> Tensor:
    """The convolution of (B, H, W, h), pixel by pixel and neighbor by neighbor."""
    out = torch.empty_like(z)
    for b, i, j in itertools.product(*map(range, z.shape[:3])):
        out[b, i, j] = adapter.conv_bias
        for di, dj in itertools.product(range(3), range(3)):
            at = i + di - 1, j + dj - 1
            if 0 <= at[0] < z.shape[1] and 0 <= at[1] < z.shape[2]:
                out[b, i, j] += adapter.conv[:, :, di, dj] @ z[b, at[0], at[1]]
    return out


def slow(adapter: Any, x: Tensor, y: Tensor) -> Tensor:
    """Images (B, H, W, C), or tokens (B, P, C) as images of one pixel."""
    pictures = x if x.ndim == 4 else x.flatten(0, 1)[:, None, None]
    z = act(everywhere(lambda v: adapter.down @ v + adapter.down_bias, pictures))
    z = act(convolved(adapter, z))
    return y + adapter.scale * everywhere(lambda v: adapter.up @ v + adapter.up_bias, z).view(y.shape)


def test_the_equation_in_every_layout() -> None:
    check_layouts(Convpass(bottleneck=3, scale=0.7), branch, slow)


def test_without_prefix_tokens_and_on_a_larger_grid() -> None:
    adapter = trained(Convpass(bottleneck=3), branch(prefix=0))
    x, y = random(2, 4, 6, 5), random(2, 4, 6, 5, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(adapter.output(x.flatten(1, 2), y.flatten(1, 2)), slow(adapter, x, y).flatten(1, 2))


def test_rows_and_columns_are_not_confused() -> None:
    """On 2 × 3 patches each neighbor is where the grid says: one patch affects exactly its neighbors."""
    adapter = trained(Convpass(bottleneck=3), branch())
    x = random(1, PREFIX + 6, 5)
    moved = x.clone()
    moved[:, PREFIX] += 1  # the patch at (0, 0)
    with torch.no_grad():
        reached = (adapter.output(moved, x) - adapter.output(x, x)).abs().amax((0, 2)) > 1e-9
    assert reached.tolist() == [False] * PREFIX + [True, True, False, True, True, False]


@pytest.mark.parametrize(("key", "prefix"), [("vit", 1), ("deit_distilled", 2), ("vit_registers", 3)])
def test_a_vit_with_the_papers_blocks(key: str, prefix: int) -> None:
    """x + Attn(LN x) + s·C(LN x), then x + MLP(LN x) + s·C(LN x), with torch's own convolution of a 4 × 4 grid."""
    bare, model = tiny(key), tiny(key)
    adapters = stirred(attach(model, "convpass", bottleneck=4, scale=0.5))
    assert len(adapters) == 4

    def bypass(depth: int, kind: str, x: Tensor) -> Tensor:
        a: Any = adapters[f"blocks.{depth}.{kind}.branch"]
        z = act(x @ a.down.T + a.down_bias)
        patches = z[:, prefix:].transpose(1, 2).reshape(len(z), 4, 4, 4)
        patches = F.conv2d(patches, a.conv, a.conv_bias, padding=1).flatten(2).transpose(1, 2)
        alone = [F.conv2d(z[:, i, :, None, None], a.conv, a.conv_bias, padding=1).flatten(1) for i in range(prefix)]
        return 0.5 * (act(torch.cat([torch.stack(alone, 1), patches], 1)) @ a.up.T + a.up_bias)

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        normed = b.norm1(x)
        x = x + b.ls1(b.attn(normed)) + bypass(depth, "attn", normed)
        normed = b.norm2(x)
        return x + b.ls2(b.mlp(normed)) + bypass(depth, "mlp", normed)

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


def test_images_of_another_size() -> None:
    """Twice the side has the grid of twice the side; another aspect ratio is rejected with the site and shapes."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **options).eval()
    attach(model, "convpass")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with raises(HostChanged, where="blocks.0.attn.branch", given=8, expected=(4, 4)):
        model(torch.randn(1, 3, 32, 16))


def test_published_counts() -> None:
    """327,552 on ViT-B/16, half of it on the attention alone."""
    with torch.device("meta"):
        for where, expected in ((None, 327_552), ("attn", 163_776)):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
            assert attach(vit, "convpass", where=where).report().trainable == expected


@pytest.mark.parametrize("init", ["identity", "xavier"])
def test_start(init: Any) -> None:
    """Down within sqrt(6 / (in + out)), Up and biases zero; the convolution is the identity, or is initialized like Down."""
    torch.manual_seed(0)
    adapter = Convpass(bottleneck=64, init=init).build(branch(width=256))
    for weight, fans in [(adapter.down, 64 + 256), *([(adapter.conv, 9 * 128)] if init == "xavier" else [])]:
        bound = (6 / fans) ** 0.5
        assert bound * 0.99 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    if init == "identity":
        z = torch.randn(1, 64, *GRID)
        torch.testing.assert_close(F.conv2d(z, adapter.conv, padding=1), z)
    assert not any(p.any() for name, p in adapter.named_parameters() if name not in ("down", "conv"))


def test_sites_without_a_norm_in_front_or_without_a_grid_do_not_fit() -> None:
    method = Convpass()
    assert supports(method, branch())
    assert supports(method, branch("NHWC", grid=None))
    assert supports(method, branch("NCHW", grid=None))
    assert not supports(method, branch(grid=None))
    for layout in ("NLC", "NHWC", "NCHW"):
        assert not supports(method, branch(layout, normed=None))
    with raises(UnsupportedSite, method="convpass", host="timm_conv", given={"grid": None, "layout": "NCHW", "normed": None}):
        attach(timm.create_model("resnet18", channels=(8, 8, 8, 8), stem_width=8), "convpass")


@pytest.mark.parametrize(("option", "given"), [("bottleneck", 0), ("dropout", 1.5), ("drop_path", 1.0), ("init", "eye")])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="convpass", option=option, given=given):
        Convpass(**{option: given})
