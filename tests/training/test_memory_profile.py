"""Peak memory, against tensors of known sizes."""

from __future__ import annotations

import pytest
import torch

from veneer.training.report.memory_profile import peak, peak_of

KIB = 1024


def held_at_once() -> None:
    first = torch.ones(100 * KIB, dtype=torch.uint8)
    second = torch.ones(300 * KIB, dtype=torch.uint8)
    del first, second
    torch.ones(200 * KIB, dtype=torch.uint8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is weighed on the device, where blocks are rounded")
def test_the_peak_is_of_simultaneous_tensors_not_their_sum() -> None:
    assert peak(held_at_once) == pytest.approx(400 * KIB, rel=0.01)


def test_earlier_tensors_do_not_count() -> None:
    kept = torch.ones(500 * KIB, dtype=torch.uint8)
    assert peak(lambda: kept[:10]) < 10 * KIB


@pytest.mark.parametrize(
    ("changes", "highest"), [([], 0), ([5, -5, 3], 5), ([5, 4, -9, 8], 9), ([-7, 3], 0), ([2, -1, 2, -3, 1], 3)]
)
def test_the_highest_sum(changes: list[int], highest: int) -> None:
    assert peak_of(changes) == highest
