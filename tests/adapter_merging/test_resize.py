"""Ranks: the best of a rank, exact at the true one, and how much each condition keeps."""

from __future__ import annotations

import math

import pytest
import torch

from tests.adapter_merging.cases import change, lost, pipeline, put
from tests.raising import raises
from veneer.adapter_merging import Keep, resize
from veneer.functional.low_rank import cut, oblong_svd, product_norm, product_svd
from veneer.injection.errors import OptionError


def test_the_product_is_never_needed() -> None:
    left, right = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(2, 3, 11, dtype=torch.float64)
    u, s, vh = product_svd(left, right)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:, :3])
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vh, left @ right)
    c, d = cut(u, s, vh, 2)
    torch.testing.assert_close(c.pow(2).sum(1), s[:, :2])  # √σ in each
    assert float((c @ d - left @ right).pow(2).sum()) == pytest.approx(float(s[:, 2].pow(2).sum()))
    assert product_norm(left, right) == pytest.approx(float((left @ right).norm()))


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 4, 4)])
def test_tall_and_wide_matrices(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vh = oblong_svd(matrix)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vh, matrix)
    torch.testing.assert_close(u.mT @ u, torch.eye(min(shape[1:]), dtype=torch.float64).expand(shape[0], -1, -1))
    torch.testing.assert_close(vh @ vh.mT, torch.eye(min(shape[1:]), dtype=torch.float64).expand(shape[0], -1, -1))


@pytest.mark.parametrize("true", [2, 4])
def test_at_the_true_rank_nothing_is_lost(true: int) -> None:
    """The factors have rank 4, their product `true`."""
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=4, alpha=6.0)
    with torch.no_grad():
        for _, adapter in source.parts.values():
            adapter.up[:, true:] = adapter.up[:, :1]
            adapter.down[true:] = adapter.down[:1]
    wanted = {n: change(source, n) for n in source.parts}
    made = resize(pipe, source, true)
    assert {m.rank for m in made.made} == {true}
    assert all(lost(wanted[n], change(made.attachment, n)) < 1e-6 for n in wanted)
    assert made.error < 1e-6
    assert "error" in str(made)


def test_the_best_of_a_lower_rank_and_its_error() -> None:
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=4)
    sigmas = {n: torch.linalg.svdvals(change(source, n)) for n in source.parts}
    wanted = {n: change(source, n) for n in source.parts}
    made = resize(pipe, source, 2)
    for name, s in sigmas.items():
        best = math.sqrt(float(s[2:].pow(2).sum() / s.pow(2).sum()))
        assert made.errors()[name] == pytest.approx(best, abs=1e-6)
        assert lost(wanted[name], change(made.attachment, name)) == pytest.approx(best, abs=1e-6)
    assert str(made).splitlines()[0].startswith(f"{len(wanted)} weights, rank 2, error ")


def test_lower_ranks_stay_as_they_are() -> None:
    pipe = pipeline()
    source = put(pipe, "lora", 1, rank=4, ranks={"attn.q": 2})
    state = {k: v.clone() for k, v in source.state_dict().items()}
    made = resize(pipe, source, 3)
    ranks = {m.site.role: m.rank for m in made.made}
    assert ranks == {"attn.q": 2, "attn.out": 3, "conv.io": 3}
    kept = [m.site.name for m in made.made if m.rank == 2]
    assert all(torch.equal(made.attachment.state_dict()[f"{n}:down"], state[f"{n}:down"]) for n in kept)


SIGMA = torch.tensor([[8.0, 4.0, 2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("keep", "count"),
    [
        (Keep(rank=3), 3),
        (Keep(rank=9), 4),  # zeros are no rank
        (Keep(energy=64 / 85), 1),
        (Keep(energy=0.76), 2),
        (Keep(energy=1.0), 4),
        (Keep(error=math.sqrt(1 / 85) + 1e-9), 3),
        (Keep(error=0.0), 4),
        (Keep(cumulative=0.8), 2),
        (Keep(cumulative=0.81), 3),
        (Keep(ratio=4.0), 2),  # 8 / 2 is not below 4
        (Keep(ratio=4.1), 3),
        (Keep(rank=2, energy=1.0), 2),
    ],
)
def test_how_much_each_condition_keeps(keep: Keep, count: int) -> None:
    assert keep.count(SIGMA) == count


def test_groups_keep_equally_many() -> None:
    """√(64 + 1), √(16 + 1), … decide; a rank is of all groups together."""
    sigma = torch.tensor([[8.0, 4.0, 2.0], [1.0, 1.0, 1.0]])
    assert Keep(energy=65 / 87).count(sigma) == 1
    assert Keep(energy=0.75).count(sigma) == 2
    assert Keep(rank=4).count(sigma) == 2
    assert Keep(rank=1).count(sigma) == 1


def test_no_change_has_rank_1() -> None:
    assert Keep(energy=0.9).count(torch.zeros(1, 3)) == 1


@pytest.mark.parametrize(
    "options", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"error": -0.1}, {"ratio": 1.0}, {"energy": 0.5, "error": 0.5}]
)
def test_conditions_out_of_range(options: dict[str, float]) -> None:
    option, given = next(iter(options.items())) if len(options) == 1 else ("keep", tuple(options))
    with raises(OptionError, method="keep", option=option, given=given):
        Keep(**options)  # type: ignore[arg-type]
