"""Rank reduction: the truncated SVD, exact at the true rank, and the conditions of the rank selection."""

from __future__ import annotations

import math

import pytest
import torch

from tests.adapter_merging.cases import change, lost, pipeline, put
from tests.raising import raises
from veneer.adapter_merging import RankSelection, resize
from veneer.functional.low_rank import oblong_svd, product_norm, product_svd, truncate
from veneer.injection.errors import OptionError


def test_svd_uses_the_factors() -> None:
    left, right = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(2, 3, 11, dtype=torch.float64)
    u, s, vh = product_svd(left, right)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:, :3])
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vh, left @ right)
    c, d = truncate(u, s, vh, 2)
    torch.testing.assert_close(c.pow(2).sum(1), s[:, :2])  # √σ in each
    assert float((c @ d - left @ right).pow(2).sum()) == pytest.approx(float(s[:, 2].pow(2).sum()))
    assert product_norm(left, right) == pytest.approx(float((left @ right).norm()))


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 4, 4)])
def test_svd_of_tall_and_wide_matrices(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vh = oblong_svd(matrix)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vh, matrix)
    torch.testing.assert_close(u.mT @ u, torch.eye(min(shape[1:]), dtype=torch.float64).expand(shape[0], -1, -1))
    torch.testing.assert_close(vh @ vh.mT, torch.eye(min(shape[1:]), dtype=torch.float64).expand(shape[0], -1, -1))


@pytest.mark.parametrize("true", [2, 4])
def test_resize_to_the_true_rank_is_exact(true: int) -> None:
    """The factors have rank 4, their product has rank `true`."""
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=4, alpha=6.0)
    with torch.no_grad():
        for _, adapter in source.parts.values():
            adapter.up[:, true:] = adapter.up[:, :1]
            adapter.down[true:] = adapter.down[:1]
    expected = {n: change(source, n) for n in source.parts}
    result = resize(pipe, source, true)
    assert {m.rank for m in result.factors} == {true}
    assert all(lost(expected[n], change(result.attachment, n)) < 1e-6 for n in expected)
    assert result.error < 1e-6
    assert "error" in str(result)


def test_resize_is_the_truncated_svd() -> None:
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=4)
    sigmas = {n: torch.linalg.svdvals(change(source, n)) for n in source.parts}
    expected = {n: change(source, n) for n in source.parts}
    result = resize(pipe, source, 2)
    for name, s in sigmas.items():
        best = math.sqrt(float(s[2:].pow(2).sum() / s.pow(2).sum()))
        assert result.errors()[name] == pytest.approx(best, abs=1e-6)
        assert lost(expected[name], change(result.attachment, name)) == pytest.approx(best, abs=1e-6)
    assert str(result).splitlines()[0].startswith(f"{len(expected)} weights, rank 2, relative error ")


def test_resize_keeps_lower_ranks() -> None:
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=4, by_site={"attn.q": {"rank": 2}})
    state = {k: v.clone() for k, v in source.state_dict().items()}
    result = resize(pipe, source, 3)
    ranks = {m.site.role: m.rank for m in result.factors}
    assert ranks == {"attn.q": 2, "attn.out": 3, "conv.io": 3}
    kept = [m.site.name for m in result.factors if m.rank == 2]
    assert all(torch.equal(result.attachment.state_dict()[f"{n}:down"], state[f"{n}:down"]) for n in kept)


SIGMA = torch.tensor([[8.0, 4.0, 2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("keep", "count"),
    [
        (RankSelection(rank=3), 3),
        (RankSelection(rank=9), 4),  # zeros are no rank
        (RankSelection(energy=64 / 85), 1),
        (RankSelection(energy=0.76), 2),
        (RankSelection(energy=1.0), 4),
        (RankSelection(error=math.sqrt(1 / 85) + 1e-9), 3),
        (RankSelection(error=0.0), 4),
        (RankSelection(cumulative=0.8), 2),
        (RankSelection(cumulative=0.81), 3),
        (RankSelection(ratio=4.0), 2),  # 8 / 2 is not below 4
        (RankSelection(ratio=4.1), 3),
        (RankSelection(rank=2, energy=1.0), 2),
    ],
)
def test_rank_selection_conditions(keep: RankSelection, count: int) -> None:
    assert keep.count(SIGMA) == count


def test_rank_selection_of_groups() -> None:
    """Singular values count as √(64 + 1), √(16 + 1), …; the rank is the total over all groups."""
    sigma = torch.tensor([[8.0, 4.0, 2.0], [1.0, 1.0, 1.0]])
    assert RankSelection(energy=65 / 87).count(sigma) == 1
    assert RankSelection(energy=0.75).count(sigma) == 2
    assert RankSelection(rank=4).count(sigma) == 2
    assert RankSelection(rank=1).count(sigma) == 1


def test_rank_selection_of_zero_is_one() -> None:
    assert RankSelection(energy=0.9).count(torch.zeros(1, 3)) == 1


@pytest.mark.parametrize(
    "options", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"error": -0.1}, {"ratio": 1.0}, {"energy": 0.5, "error": 0.5}]
)
def test_rank_selection_errors(options: dict[str, float]) -> None:
    option, given = next(iter(options.items())) if len(options) == 1 else ("keep", tuple(options))
    with raises(OptionError, method="keep", option=option, given=given):
        RankSelection(**options)  # type: ignore[arg-type]
