"""Products over channels in every layout, against a loop over positions, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.functional.channels import Layout, add_channels_product, channels_product, drop_path_mask

LAYOUTS: dict[Layout, tuple[int, ...]] = {"NLC": (2, 6), "NHWC": (2, 2, 3), "NCHW": (2, 2, 3)}
every = pytest.mark.parametrize("layout", LAYOUTS)
biased = pytest.mark.parametrize("bias", [True, False])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def features(layout: Layout, channels: int, seed: int) -> Tensor:
    drawn = draw(*LAYOUTS[layout], channels, seed=seed).detach()
    return (drawn.movedim(-1, 1).contiguous() if layout == "NCHW" else drawn).requires_grad_()


def looped(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    last = x.movedim(1, -1) if layout == "NCHW" else x
    rows = [weight @ v + (0 if bias is None else bias) for v in last.reshape(-1, last.shape[-1])]
    product = torch.stack(rows).view(*last.shape[:-1], len(weight))
    return product.movedim(-1, 1) if layout == "NCHW" else product


@every
@biased
def test_a_product(layout: Layout, bias: bool) -> None:
    x, weight, shift = features(layout, 5, 1), draw(3, 5, seed=2), draw(3, seed=3) if bias else None
    torch.testing.assert_close(channels_product(x, weight, shift, layout), looped(x, weight, shift, layout))
    given = (x, weight, shift) if bias else (x, weight)
    assert torch.autograd.gradcheck(lambda *a: channels_product(*a[:2], a[2] if bias else None, layout), given)
    assert torch.autograd.gradgradcheck(lambda *a: channels_product(*a[:2], a[2] if bias else None, layout), given)


@every
@biased
def test_a_sum_with_a_product(layout: Layout, bias: bool) -> None:
    y, z, weight, shift = features(layout, 5, 1), features(layout, 3, 2), draw(5, 3, seed=3), draw(5, seed=4) if bias else None
    before = y.detach().clone()
    torch.testing.assert_close(add_channels_product(y, z, weight, shift, layout), y + looped(z, weight, shift, layout))
    assert torch.equal(y, before)
    given = (y, z, weight, shift) if bias else (y, z, weight)
    assert torch.autograd.gradcheck(lambda *a: add_channels_product(*a[:3], a[3] if bias else None, layout), given)
    assert torch.autograd.gradgradcheck(lambda *a: add_channels_product(*a[:3], a[3] if bias else None, layout), given)


@every
def test_the_bias_is_left_out_with_its_sample(layout: Layout) -> None:
    y, z, weight, shift = features(layout, 5, 1), features(layout, 3, 2), draw(5, 3, seed=3), draw(5, seed=4)
    kept = torch.tensor([0.0, 2.0], dtype=torch.float64).view(2, *(1,) * (y.ndim - 1))
    got = add_channels_product(y, z * kept, weight, shift, layout, kept)
    torch.testing.assert_close(got, y + looped(z, weight, shift, layout) * kept)


@every
def test_other_dtypes_and_autocast_give_the_same_up_to_rounding(layout: Layout) -> None:
    y, z, weight, shift = features(layout, 5, 1), features(layout, 3, 2), draw(5, 3, seed=3), draw(5, seed=4)
    want = y + looped(z, weight, shift, layout)
    got = add_channels_product(y.bfloat16(), z.float(), weight.float(), shift.float(), layout)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        got = add_channels_product(y.float(), z.float(), weight.float(), shift.float(), layout)
        low = channels_product(y.float(), weight.float().T, None, layout)
    torch.testing.assert_close(got.double(), want, rtol=3e-2, atol=5e-2)
    torch.testing.assert_close(low.double(), looped(y, weight.T, None, layout), rtol=3e-2, atol=5e-2)


def test_images_that_are_channels_last_in_memory() -> None:
    x, weight = features("NCHW", 5, 1).to(memory_format=torch.channels_last), draw(3, 5, seed=2)
    torch.testing.assert_close(channels_product(x, weight, None, "NCHW"), looped(x, weight, None, "NCHW"))
    torch.testing.assert_close(
        add_channels_product(x, x, weight.T @ weight, None, "NCHW"), x + looped(x, weight.T @ weight, None, "NCHW")
    )


def test_drop_path_keeps_its_rate_and_the_mean() -> None:
    torch.manual_seed(0)
    kept = drop_path_mask(torch.zeros(20_000, 2, 3), 0.25, True)
    assert kept is not None
    assert kept.shape == (20_000, 1, 1)
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert kept.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("probability", "training"), [(0.0, True), (0.5, False)])
def test_nothing_is_sampled_without_drop_path(probability: float, training: bool) -> None:
    before = torch.get_rng_state()
    assert drop_path_mask(torch.zeros(4, 2), probability, training) is None
    assert torch.equal(torch.get_rng_state(), before)
