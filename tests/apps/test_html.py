"""Tables and lists of pages: bounded, and plain text."""

from __future__ import annotations

import pytest
from veneer.apps.pages.shared.html import MAX_ROWS, facts, name_list, note, table

MARK = "<b>&</b>"


def test_long_tables_and_lists_are_truncated_with_a_note() -> None:
    rows = [[f"row {n}", n] for n in range(MAX_ROWS + 1234)]
    told = table("Rows", ["name", "number"], rows)
    assert (told.count("<tr>"), f"row {MAX_ROWS - 1}<" in told, f"row {MAX_ROWS}<" in told) == (MAX_ROWS + 1, True, False)
    assert "1,234 more are not shown" in told
    assert "more are not shown" not in table("Rows", ["name", "number"], rows[:MAX_ROWS])
    told = name_list("Rows", [str(name) for name, _ in rows])
    assert (told.count("<li>"), "1,234 more are not shown" in told) == (MAX_ROWS, True)
    assert name_list("Rows", []) == ""


@pytest.mark.parametrize(
    "told", [table(MARK, [MARK], [[MARK]]), facts([(MARK, MARK)]), name_list(MARK, [MARK]), note(MARK, "good")],
    ids=["table", "facts", "names", "note"],
)  # fmt: skip
def test_text_is_escaped(told: str) -> None:
    assert "<b>" not in told
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in told
