"""y + B (A x), against plain products, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.functional.low_rank_autograd import add_product, project


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    draws = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_gradients_of_a_projection(batch: tuple[int, ...]) -> None:
    x, down = draw((*batch, 5), (2, 5))
    torch.testing.assert_close(project(x, down), x @ down.T)
    assert torch.autograd.gradcheck(project, (x, down))
    assert torch.autograd.gradgradcheck(project, (x, down))


@pytest.mark.parametrize(("y", "z", "up"), [((4, 7), (4, 2), (7, 2)), ((2, 3, 7), (2, 3, 2), (7, 2)), ((7,), (2,), (7, 2))])
def test_gradients_of_a_sum_with_a_product(y: tuple[int, ...], z: tuple[int, ...], up: tuple[int, ...]) -> None:
    given = draw(y, z, up)
    torch.testing.assert_close(add_product(*given), given[0] + given[1] @ given[2].T)
    assert torch.autograd.gradcheck(add_product, given)
    assert torch.autograd.gradgradcheck(add_product, given)


@pytest.mark.parametrize("size", [(3,), (3, 4), (2, 3, 2)])
def test_gradients_of_a_sum_with_a_convolution_of_one_pixel(size: tuple[int, ...]) -> None:
    ones = (1,) * len(size)
    given = draw((2, 5, *size), (2, 3, *size), (5, 3, *ones))
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    torch.testing.assert_close(add_product(*given), given[0] + conv(given[1], given[2]))
    assert torch.autograd.gradcheck(add_product, given)
    assert torch.autograd.gradgradcheck(add_product, given)


def test_over_y_nothing_is_allocated_and_the_gradients_are_the_same() -> None:
    x, z, up = draw((4, 3, 7), (4, 3, 2), (7, 2))
    layer = torch.nn.Linear(7, 7, dtype=torch.float64)
    kept, written = layer(x), layer(x)
    want = add_product(kept, z, up)
    got = add_product(written, z, up, over=True)
    assert got.data_ptr() == written.data_ptr() != kept.data_ptr()
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (x, z, up)) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_overwriting_a_tensor_kept_for_a_backward_pass_is_an_error() -> None:
    x, z, up = draw((4, 7), (4, 2), (7, 2))
    y = x * 2
    kept = y.square()  # keeps y
    add_product(y, z, up, over=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_dtypes_that_differ_autocast_and_transforms_take_torchs_own_operations() -> None:
    x, y, z, up, down = (t.detach() for t in draw((4, 5), (4, 7), (4, 2), (7, 2), (2, 5)))
    want = y + z @ up.T
    torch.testing.assert_close(add_product(y.float(), z, up, over=True), want, check_dtype=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(x.float(), down.float()).dtype == torch.bfloat16
    each = torch.func.vmap(torch.func.grad(lambda row: add_product(row, row[:2], up).sum()))(y)
    assert each.shape == y.shape
    torch.testing.assert_close(each[:, :2], 1 + up.sum(0).expand(4, 2))
