"""EMA weights against the explicit recurrence, and swapping them in and out."""

import pytest
import torch

from veneer.training.loop.ema import EMA


def test_average_follows_the_recurrence():
    weight = torch.zeros(3)
    ema = EMA({"w": weight}, decay=0.5)
    expected, random = torch.zeros(3), torch.Generator().manual_seed(0)
    for step in range(6):
        weight.copy_(torch.randn(3, generator=random))
        ema.update(step)
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ema.averages["w"], expected)


@pytest.mark.parametrize(
    ("warmup", "step", "decay"),
    [
        ("ramp", 0, 0.0),
        ("ramp", 1, 2 / 11),
        ("ramp", 10**6, 0.9999),
        ("power", 0, 0.0),
        ("power", 7, 1 - 8 ** (-2 / 3)),
        ("power", 10**9, 0.9999),
    ],
)
def test_decay_rises_to_its_limit(warmup, step, decay):
    assert EMA({}, 0.9999, warmup).decay_at(step) == pytest.approx(decay)


def test_swapped_puts_the_averages_in_and_the_weights_back_bitwise():
    weight = torch.randn(4, generator=torch.Generator().manual_seed(1))
    ema = EMA({"w": weight}, decay=0.9)
    ema.averages["w"].fill_(2.0)
    before = weight.clone()
    with ema.swapped():
        assert torch.equal(weight, torch.full((4,), 2.0))
        with ema.swapped():
            assert torch.equal(weight, torch.full((4,), 2.0))
        assert torch.equal(weight, torch.full((4,), 2.0))
    assert torch.equal(weight, before)


def test_weights_come_back_after_an_error():
    weight = torch.ones(2)
    ema = EMA({"w": weight}, decay=0.9)
    ema.averages["w"].fill_(5.0)
    with pytest.raises(RuntimeError, match="preview"), ema.swapped():
        raise RuntimeError("preview")
    assert torch.equal(weight, torch.ones(2))
    with ema.swapped():
        assert torch.equal(weight, torch.full((2,), 5.0))
