"""The measurement itself: relative differences, empty comparisons, and files of a commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.parity.measure import EmptyComparison, largest_difference, measure, randn
from tests.parity.oracle import OracleMissing, Repository
from tests.parity.sources import SOURCES


def test_the_largest_relative_difference_of_pairs() -> None:
    one = torch.tensor([1.0, -4.0])
    assert largest_difference([(one, one), (one * 1.5, one)]) == 0.5
    assert largest_difference([(one + torch.tensor([1.0, 0.0]), one)]) == 0.25
    assert largest_difference([(torch.zeros(2), one)]) == 1.0


def test_an_oracle_that_is_all_zero_proves_nothing() -> None:
    with pytest.raises(EmptyComparison) as info:
        largest_difference([(torch.ones(2), torch.ones(2)), (torch.zeros(2), torch.zeros(2))])
    assert info.value.index == 1


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError):
        largest_difference([(torch.ones(2, 1), torch.ones(2))])


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (2.0, 1.0)])
def test_outputs_and_gradients_are_measured(factor: float, expected: float) -> None:
    """Equal outputs with a gradient that is `factor` times the oracle's."""
    ours, theirs, x = nn.Linear(3, 2).double(), nn.Linear(3, 2).double(), randn(4, 3)

    def output() -> torch.Tensor:
        y = ours(x)
        return y.detach() + factor * (y - y.detach())

    links = [(ours.weight, lambda read: read(theirs.weight)), (ours.bias, lambda read: read(theirs.bias))]
    assert measure(output, lambda: theirs(x), links) == pytest.approx(expected, abs=1e-12)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_files_are_those_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later commit does not matter; a commit that is not there, and a repository that is not there, are missing."""
    clone = tmp_path / "owner+name"
    clone.mkdir()
    git(clone, "init", "-q")
    commits = []
    for number in (1, 2):
        (clone / "code.py").write_text(
            f"import nowhere\nNUMBER = {number}\n\ndef f():\n    return NUMBER\n\ndef g():\n    return nowhere\n"
        )
        git(clone, "add", ".")
        git(clone, "commit", "-qm", "code")
        commits.append(git(clone, "rev-parse", "HEAD"))
    monkeypatch.setenv(SOURCES, str(tmp_path))
    code = Repository("owner/name", commits[0]).definitions("code.py", "f", "NUMBER", replace={"return": "return 10 *"})
    assert code.f() == 10
    assert not hasattr(code, "g")
    for missing in (Repository("owner/name", "0" * 40), Repository("owner/other", commits[0])):
        with pytest.raises(OracleMissing) as info:
            missing.read("code.py")
        assert info.value.where == tmp_path / missing.name.replace("/", "+")
