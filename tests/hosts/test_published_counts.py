"""Methods have the parameter counts of their papers and authors' code, or the page has the reason."""

from __future__ import annotations

import pytest

from tests.hosts.published_counts import COUNTS, PAGE, Count, page, trained


@pytest.mark.parametrize("count", COUNTS, ids=lambda c: f"{c.method}-{c.model}-{c.published}".replace(" ", "_"))
def test_a_method_has_the_published_count(count: Count) -> None:
    ours = trained(count)
    assert count.equal(ours) != bool(count.why), f"{ours:,} against {count.published}"


def test_rounded_counts_are_compared_at_their_precision() -> None:
    stated = Count("lst", "ViT-B/16", "2.38 M")
    assert stated.equal(2_376_492)
    assert stated.equal(2_384_999)
    assert not stated.equal(2_385_001)
    assert not stated.equal(2_374_999)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.hosts.published_counts"
