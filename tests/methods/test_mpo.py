"""MPO: chains of tensors contracted by one explicit sum, exact and truncated decompositions, shapes and counts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.methods.layers import site_of
from tests.methods.weight_updates import check_update
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.reparameterized.tensor_train.mpo import MPO, split_width, tensor_shapes

CHAIN = "aijb,bklc,cmnd,dope,eqrf->ikmoqjlnpr"  # W by rows and columns
CENTER = "aijb,bklc,ikmoqjlnpr,dope,eqrf->cmnd"  # the central tensor: W projected on the others


def contract(adapter: Any, outer: list[Tensor], weight: Tensor) -> Tensor:
    """The chain of the outer tensors around the central tensor of W."""
    first = adapter.initial()
    order = weight.reshape(*adapter.rows, *adapter.columns)
    center = torch.einsum(CENTER, first[0], first[1], order, first[2], first[3])
    return torch.einsum(CHAIN, outer[0], outer[1], center, outer[2], outer[3]).reshape(weight.shape)


def move(adapter: Any) -> None:
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)


@pytest.mark.parametrize(
    ("host", "name", "where", "bond"),
    [("timm_vit", "vit", "attn.{q,v} mlp.in conv.patch", None), ("diffusers_dit", "dit", "attn.q", 3)],
)
def test_the_chain_around_the_frozen_central_tensor(host: str, name: str, where: str, bond: int | None) -> None:
    """W' = W + (chain − initial chain), where the initial chain is W without a limit."""

    def change(adapter: Any, weight: Tensor) -> Tensor:
        start = contract(adapter, adapter.initial(), weight)
        if bond is None:
            torch.testing.assert_close(start, weight, rtol=1e-5, atol=1e-6)  # decomposed in single precision
        return contract(adapter, list(adapter.auxiliary), weight) - start

    check_update(host, name, MPO(bond=bond), change, where, move)


def entered(weight: Tensor, **options: Any) -> Any:
    base = nn.Linear(weight.shape[1], weight.shape[0]).double()
    base.weight.data = weight
    adapter = MPO(**options).build(site_of(base)).double()
    adapter.enter(nn.Sequential(base))
    return adapter


def test_decomposition() -> None:
    """Exact for every bond without a limit, and with a limit for a weight whose bonds are at most that."""
    torch.manual_seed(0)
    weight = torch.randn(24, 60, dtype=torch.float64)
    adapter = entered(weight, factor=3)
    torch.testing.assert_close(contract(adapter, adapter.initial(), weight), weight)
    left, right = adapter._contract(adapter.initial())
    for vectors in (left.T @ left, right @ right.T):
        torch.testing.assert_close(vectors, torch.eye(len(vectors), dtype=torch.float64))
    assert torch.equal(adapter.weight(weight), weight)
    shapes = tensor_shapes(adapter.rows, adapter.columns, 2)
    weight = torch.einsum(CHAIN, *(torch.randn(shape, dtype=torch.float64) for shape in shapes)).reshape(24, 60)
    small = entered(weight, factor=3, bond=2)
    torch.testing.assert_close(contract(small, small.initial(), weight), weight)
    assert [tuple(p.shape) for p in small.auxiliary] == [shape for k, shape in enumerate(shapes) if k != 2]


def test_a_convolution_is_decomposed_with_its_kernel() -> None:
    base = nn.Conv2d(4, 6, 3, groups=2).double()
    adapter = MPO().build(site_of(base)).double()
    adapter.enter(nn.Sequential(base))
    assert (adapter.rows, adapter.columns) == ([3, 1, 1, 1, 2], [3, 2, 1, 1, 3])
    assert torch.equal(adapter.weight(base.weight), base.weight)
    with torch.no_grad():
        adapter.auxiliary[0].mul_(2)
    torch.testing.assert_close(adapter.weight(base.weight), 2 * base.weight)


def test_widths_and_published_counts() -> None:
    """131,584 trained parameters for each of the 48 linear layers of ViT-B/16."""
    splits = {768: (4, 4, 3, 4, 4), 2304: (4, 4, 9, 4, 4), 3072: (4, 4, 12, 4, 4), 4304: (4, 1, 269, 1, 4), 7: (1, 1, 7, 1, 1)}
    assert {width: split_width(width, 5, 4) for width in splits} == splits
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "mpo", where="attn.qkv attn.out mlp").report().trainable == 6_316_032 == 48 * 131_584


@pytest.mark.parametrize(("option", "given"), [("tensors", 4), ("tensors", 1), ("factor", 1), ("bond", 0)])
def test_bad_options(option: str, given: int) -> None:
    with raises(OptionError, method="mpo", option=option, given=given):
        MPO(**{option: given})
