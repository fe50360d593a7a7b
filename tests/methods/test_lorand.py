"""LoRand: y + W' GELU(W y + b) + b' with W = Σ P K Q, against dense matrices and blocks that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.bottlenecks import (
    WIDTH,
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
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.bottleneck.lorand import LoRand

OPTIONS = [{"branches": 2, "rank": 3}, {"branches": 3, "rank": 2, "share_kernel": False, "reduction": 1}]


def matrices(a: Any) -> tuple[Tensor, Tensor]:
    """W (h, width) and W' (width, h), branch by branch."""
    up_kernel = a.kernel if a.up_kernel is None else a.up_kernel
    down = sum(p @ k @ q for p, k, q in zip(a.down_in, a.kernel, a.down_out, strict=True))
    up = sum(p @ k @ q for p, k, q in zip(a.up_in, up_kernel, a.up_out, strict=True))
    return down.T, up.T


def slow(a: Any, x: Tensor, y: Tensor) -> Tensor:
    down, up = matrices(a)
    return y + everywhere(lambda v: up @ F.gelu(down @ v + a.down_bias) + a.up_bias, x)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_equation_in_every_layout(options: Any) -> None:
    check_layouts(LoRand(**options), branch, slow)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_the_dense_matrices(options: Any) -> None:
    adapter = trained(LoRand(**options), branch())
    y = random(2, 8, WIDTH).requires_grad_()
    inputs, weight = [y, *adapter.parameters()], random(2, 8, WIDTH, seed=1)
    assert len(inputs) == (8 if adapter.up_kernel is None else 9)
    got = torch.autograd.grad((adapter.output(y, y) * weight).sum(), inputs)
    expected = torch.autograd.grad((slow(adapter, y, y) * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("share_kernel", [True, False])
def test_a_vit_with_the_papers_blocks(share_kernel: bool) -> None:
    """x + L(Attn(LN x)), then x + L(MLP(LN x)), with L(z) = z + W' GELU(W z + b) + b'."""
    bare, model = tiny(), tiny()
    adapters = stirred(attach(model, "lorand", share_kernel=share_kernel))
    assert len(adapters) == 4

    def module(name: str, z: Tensor) -> Tensor:
        a: Any = adapters[f"{name}.branch"]
        down, up = matrices(a)
        return z + F.gelu(z @ down.T + a.down_bias) @ up.T + a.up_bias

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = x + module(f"blocks.{depth}.attn", b.attn(b.norm1(x)))
        return x + module(f"blocks.{depth}.mlp", b.mlp(b.norm2(x)))

    with torch.no_grad():
        expected = blocks_written_out(bare, block, picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - bare(picture())).abs().max() > 1e-3


def test_strength_multiplies_the_change() -> None:
    adapter, y = trained(LoRand(rank=3), branch()), random(2, 8, 5)
    whole = adapter.output(y, y) - y
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(adapter.output(y, y) - y, whole / 4)


@pytest.mark.parametrize(
    ("model", "share_kernel", "expected"),
    [
        ("vit_base_patch16_224", True, 915_456),
        ("vit_base_patch16_224", False, 918_528),
        ("swin_base_patch4_window7_224", True, 1_197_312),
    ],
)
def test_counts(model: str, share_kernel: bool, expected: int) -> None:
    with torch.device("meta"):
        created = timm.create_model(model, num_classes=0)
        assert attach(created, "lorand", share_kernel=share_kernel).report().trainable == expected


def test_start() -> None:
    """Kaiming-uniform with a = sqrt 5: within 1 / sqrt of the last dimension; biases within 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    adapter = LoRand(rank=16, share_kernel=False).build(branch(width=512))
    bounds = {"down_in": 16, "kernel": 16, "down_out": 256, "up_in": 16, "up_kernel": 16, "up_out": 512}
    for name, inputs in {**bounds, "down_bias": 512, "up_bias": 256}.items():
        p = adapter.get_parameter(name)
        assert 0.97 * inputs**-0.5 < p.abs().max() <= inputs**-0.5, name


def test_zero_initialization_leaves_the_output_unchanged() -> None:
    model = tiny()
    before = model(picture())
    tuned = attach(model, "lorand", init="zero")
    assert torch.equal(model(picture()), before)
    zero = {name.rpartition(":")[2].rpartition(".")[2] for name, p in tuned.named_parameters() if not p.any()}
    assert zero == {"up_out", "up_bias"}


@pytest.mark.parametrize(("option", "given"), [("branches", 0), ("rank", 0), ("reduction", 0), ("init", "one")])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="lorand", option=option, given=given):
        LoRand(**{option: given})
