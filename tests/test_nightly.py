"""The list of nightly tests names tests that exist, and leaves one of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.nightly import BUT_FIRST, NIGHTLY, nightly

HERE = Path(__file__).parent


@pytest.mark.parametrize("entry", sorted((*NIGHTLY, *BUT_FIRST)))
def test_an_entry_is_the_beginning_of_a_test(entry: str) -> None:
    file, _, name = entry.partition("::")
    assert re.search(rf"^def {name or 'test_'}", (HERE / file).read_text(), re.MULTILINE)


def test_the_first_case_runs_with_every_commit() -> None:
    file = BUT_FIRST[0].partition("::")[0]
    ids = [
        f"{BUT_FIRST[0]}[a]",
        f"{BUT_FIRST[0]}[b]",
        f"{BUT_FIRST[0]}_with_more",
        f"{file}::test_other[a]",
        f"{file}::test_other[b]",
    ]
    assert nightly(ids) == [False, True, False, False, False]
    assert nightly([f"{NIGHTLY[0]}::test_a", f"{NIGHTLY[0]}::test_a[b]"]) == [True, True]
