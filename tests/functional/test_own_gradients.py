"""The autograd functions of scaling, Kronecker products and rotations, against dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from veneer.functional.cayley import cayley_change, rotate_features, skew
from veneer.functional.channel_scale import CHUNK, scale_features
from veneer.functional.kronecker import add_kron, mix


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    draws = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_() for shape in shapes]


def check(function: Callable[..., Tensor], given: list[Tensor], want: Tensor) -> None:
    """The values; first and second derivatives of all arguments, and of each alone."""
    torch.testing.assert_close(function(*given), want)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)
    for free in range(len(given)):
        assert torch.autograd.gradcheck(function, [t if i == free else t.detach() for i, t in enumerate(given)])


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_scaled_features(batch: tuple[int, ...], shifted: bool) -> None:
    given = draw((*batch, 5), (5,), (5,))[: 2 + shifted]
    dense = given[0] @ given[1].diag()
    check(scale_features, given, dense + given[2] if shifted else dense)


@pytest.mark.parametrize("size", [(3,), (2, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_scaled_channels(size: tuple[int, ...], shifted: bool) -> None:
    given = draw((2, 5, *size), (5,), (5,))[: 2 + shifted]
    dense = torch.einsum("oc,bc...->bo...", given[1].diag(), given[0])
    check(
        lambda *args: scale_features(*args, channels=True),
        given,
        dense + given[2].view(5, *(1 for _ in size)) if shifted else dense,
    )


@pytest.mark.parametrize("rows", [CHUNK // 8 - 1, CHUNK // 8 + 1, CHUNK // 2])
def test_gradients_of_more_rows_than_are_worked_on_at_a_time(rows: int) -> None:
    y, gain, shift = draw((rows, 8), (8,), (8,))
    weigh = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.autograd.grad((scale_features(y, gain, shift) * weigh).sum(), (y, gain, shift))
    theirs = torch.autograd.grad(((y * gain + shift) * weigh).sum(), (y, gain, shift))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("p", "q"), [(2, 3), (3, 2), (1, 4)])
def test_mixed_blocks(p: int, q: int) -> None:
    x, left = draw((4, q, 5), (p, q))
    check(mix, [x, left], torch.einsum("pq,nqm->npm", left, x))


@pytest.mark.parametrize(("p", "q"), [(2, 3), (3, 2)])
def test_a_sum_with_a_kronecker_product(p: int, q: int) -> None:
    """Against C ⊗ D as a matrix, on whole rows."""
    y, x, left, right = draw((4 * p, 5), (4 * q, 2), (p, q), (5, 2))
    dense = y.view(4, -1) + x.view(4, -1) @ torch.kron(left, right).T
    check(add_kron, [y, x, left, right], dense.view(4 * p, 5))


def test_a_kronecker_product_over_y_writes_there_and_has_the_same_gradients() -> None:
    y, *rest = draw((8, 5), (12, 2), (2, 3), (5, 2))
    kept, written = y * 2, y * 2
    want, got = add_kron(kept, *rest), add_kron(written, *rest, over=True)
    assert got.data_ptr() == written.data_ptr()
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), [y, *rest]) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_rotated_features(batch: tuple[int, ...], blocks: int) -> None:
    """Against the block-diagonal matrix; one block is equal in all three cases."""
    x, change = draw((*batch, 12), (blocks, 4, 4))
    whole = torch.block_diag(*change.expand(3, -1, -1))
    check(rotate_features, [x, change], x + x @ whole)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 30.0])
def test_cayleys_transform(scale: float) -> None:
    """Against the inverse, also far from the initialization; first and second derivatives by finite differences."""
    (entries,) = draw((2, 6))
    q, one = skew(entries * scale, 4), torch.eye(4, dtype=torch.float64)
    check(lambda e: cayley_change(skew(e * scale, 4)), [entries], (one + q) @ torch.linalg.inv(one - q) - one)
