"""Mona: y + Up(GELU(Conv(Down(c ∘ LN(z) + e ∘ z)))) with z = x + y, against loops over pixels and blocks that are written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.bottlenecks import (
    PREFIX,
    WIDTH,
    blocks_written_out,
    branch,
    check_layouts,
    everywhere,
    picture,
    random,
    stirred,
    stream,
    tiny,
    trained,
)
from tests.raising import raises
from veneer.injection import HostChanged, attach
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.mona import Mona


def scaled(adapter: Any, v: Tensor) -> Tensor:
    """c ∘ LN(v) + e ∘ v for one position."""
    norm = (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()
    return adapter.norm_scale * (norm * adapter.norm_weight + adapter.norm_bias) + adapter.stream_scale * v


def mixed(adapter: Any, u: Tensor) -> Tensor:
    """The mean of the depthwise convolutions plus u, then the 1×1 convolution plus its input, pixel by pixel."""
    v = u.clone()
    for size in (3, 5, 7):
        weight, bias, pad = getattr(adapter, f"conv{size}"), getattr(adapter, f"conv{size}_bias"), size // 2
        for b, i, j in itertools.product(*map(range, u.shape[:3])):
            v[b, i, j] += bias / 3
            for di, dj in itertools.product(range(-pad, pad + 1), repeat=2):
                if 0 <= i + di < u.shape[1] and 0 <= j + dj < u.shape[2]:
                    v[b, i, j] += weight[:, 0, di + pad, dj + pad] * u[b, i + di, j + dj] / 3
    return v + everywhere(lambda at: adapter.pointwise[:, :, 0, 0] @ at + adapter.pointwise_bias, v)


def slow(adapter: Any, x: Tensor, y: Tensor) -> Tensor:
    """Images (B, H, W, C), or tokens (B, P, C) as images of one pixel."""
    z = x + y if x.ndim == 4 else (x + y).flatten(0, 1)[:, None, None]
    low = everywhere(lambda v: adapter.down @ scaled(adapter, v) + adapter.down_bias, z)
    low = F.gelu(mixed(adapter, low))
    return y + everywhere(lambda v: adapter.up @ v + adapter.up_bias, low).view(y.shape)


def test_the_equation_in_every_layout() -> None:
    check_layouts(Mona(bottleneck=3), branch, slow)


def test_gradients_are_those_of_the_equation() -> None:
    adapter = trained(Mona(bottleneck=3), branch("NHWC"))
    x, y = random(1, 2, 3, WIDTH, seed=1).requires_grad_(), random(1, 2, 3, WIDTH, seed=2).requires_grad_()
    inputs = [x, y, *adapter.parameters()]
    weight = random(1, 2, 3, WIDTH, seed=3)
    got = torch.autograd.grad((adapter.output(x, y) * weight).sum(), inputs)
    expected = torch.autograd.grad((slow(adapter, x, y) * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-6


@pytest.mark.parametrize(("key", "prefix"), [("vit", 1), ("vit_registers", 3)])
def test_a_vit_with_the_papers_blocks(key: str, prefix: int) -> None:
    """x + Attn(LN x) =: z, then M(z); M(z) + MLP(LN M(z)) =: z, then M(z), with torch's own modules on a 4 × 4 grid."""
    bare, model = tiny(key), tiny(key)
    adapters = stirred(attach(model, "mona", bottleneck=4))
    assert len(adapters) == 4

    def convolved(a: Any, z: Tensor) -> Tensor:
        kernels = {k: (getattr(a, f"conv{k}"), getattr(a, f"conv{k}_bias")) for k in (3, 5, 7)}
        z = z + sum(F.conv2d(z, *kernel, padding=k // 2, groups=4) for k, kernel in kernels.items()) / 3
        return z + F.conv2d(z, a.pointwise, a.pointwise_bias)

    def module(name: str, z: Tensor) -> Tensor:
        a: Any = adapters[f"{name}.branch"]
        normed = F.layer_norm(z, z.shape[-1:], a.norm_weight, a.norm_bias)
        low = (normed * a.norm_scale + z * a.stream_scale) @ a.down.T + a.down_bias
        patches = low[:, prefix:].transpose(1, 2).reshape(len(z), 4, 4, 4)
        alone = [convolved(a, low[:, i, :, None, None]).flatten(1) for i in range(prefix)]
        low = torch.cat([torch.stack(alone, 1), convolved(a, patches).flatten(2).transpose(1, 2)], 1)
        return z + F.gelu(low) @ a.up.T + a.up_bias

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = module(f"blocks.{depth}.attn", x + b.ls1(b.attn(b.norm1(x))))
        return module(f"blocks.{depth}.mlp", x + b.ls2(b.mlp(b.norm2(x))))

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


def test_images_of_another_size() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **options).eval()
    attach(model, "mona", bottleneck=4)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with raises(HostChanged, where="blocks.0.attn.branch", given=8, expected=(4, 4)):
        model(torch.randn(1, 3, 32, 16))


def test_strength_multiplies_the_change() -> None:
    adapter, x, y = trained(Mona(bottleneck=3), branch()), random(2, PREFIX + 6, 5), random(2, PREFIX + 6, 5, seed=1)
    whole = adapter.output(x, y) - y
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(x, y) - y, whole / 4)


@pytest.mark.parametrize(
    ("model", "expected"), [("vit_base_patch16_224", 2_684_928), ("swin_base_patch4_window7_224", 3_667_456)]
)
def test_counts(model: str, expected: int) -> None:
    """The sizes of the authors' code: 64 features, two modules for each block."""
    with torch.device("meta"):
        assert attach(timm.create_model(model, num_classes=0), "mona").report().trainable == expected


def test_start() -> None:
    """Down and Up normal with 0.02; kernels and their biases within 1 / sqrt(fan in)."""
    torch.manual_seed(0)
    adapter = Mona(bottleneck=128).build(branch(width=256))
    for weight in (adapter.down, adapter.up):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert weight.abs().max() > 0.06
    for name, inputs in (("conv3", 9), ("conv5", 25), ("conv7", 49), ("pointwise", 128)):
        for p in (adapter.get_parameter(name), adapter.get_parameter(f"{name}_bias")):
            assert 0.9 * inputs**-0.5 < p.abs().max() <= inputs**-0.5
    assert not adapter.down_bias.any()
    assert not adapter.up_bias.any()
    assert adapter.norm_scale.unique().tolist() == pytest.approx([1e-6])
    assert adapter.stream_scale.unique().tolist() == [1]


def test_zero_initialization_leaves_the_output_unchanged() -> None:
    model = tiny()
    before = model(picture())
    attach(model, "mona", init="zero")
    assert torch.equal(model(picture()), before)


def test_sites_without_a_grid_are_not_supported() -> None:
    assert supports(Mona(), branch())
    assert supports(Mona(), branch("NCHW", grid=None, normed=None))
    assert not supports(Mona(), branch(grid=None))
    assert not supports(Mona(), stream())


@pytest.mark.parametrize(("option", "given"), [("bottleneck", 0), ("dropout", 1.0), ("init", "ones")])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="mona", option=option, given=given):
        Mona(**{option: given})
