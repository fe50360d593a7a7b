"""A product of low rank for each sample of a batch."""

import pytest
import torch

from veneer.functional.batched_low_rank import add_products


@pytest.mark.parametrize("over", [False, True])
def test_products_of_each_sample_at_once(over: bool) -> None:
    """Against row by row, with two copies, with tokens and without; `over` writes into the given tensor."""
    draws = torch.Generator().manual_seed(0)
    ranks = (3, 1, 2)
    downs = [torch.randn(r, 5, generator=draws, dtype=torch.float64) for r in ranks]
    ups = [torch.randn(4, r, generator=draws, dtype=torch.float64) for r in ranks]
    for between in ((), (7,), (2, 3)):
        x = torch.randn(6, *between, 5, generator=draws, dtype=torch.float64)
        y = torch.randn(6, *between, 4, generator=draws, dtype=torch.float64)
        expected = torch.stack([y[i] + x[i] @ downs[i % 3].T @ ups[i % 3].T for i in range(6)])
        before = y.clone()
        with torch.no_grad():
            got = add_products(x, y, downs, ups, over)
        torch.testing.assert_close(got, expected)
        assert torch.equal(y, got if over else before)
