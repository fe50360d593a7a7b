"""Parts of a page are told of changes by one event for all."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.server import build
from veneer.apps.watching import WatchingBlocks, watch


def _digests(page: WatchingBlocks, *values: object) -> list[str]:
    return list(page.digests(gr.Request(), *values))


def test_a_digest_changes_with_its_stamp_alone() -> None:
    state = {"a": 1, "b": 1}
    with AppBlocks() as page:
        choice = gr.Textbox(label="Run")
        watch("a", lambda request: [state["a"]])
        watch("b", lambda request, run, again: {run: state["b"], "again": again}, [choice, choice])
        watch("c", lambda request, run: run, [choice])
    first = _digests(page, "x", "y", "z")
    assert len(set(first)) == 3
    assert _digests(page, "x", "y", "z") == first
    state["a"] = 2
    a, *others = _digests(page, "x", "y", "z")
    assert (a != first[0], others) == (True, first[1:])
    state["b"] = 2
    assert _digests(page, "x", "y", "z")[2] == first[2]
    assert [new == old for new, old in zip(_digests(page, "x", "y", "w"), (a, *others), strict=True)] == [True, False, False]


def test_parts_that_watch_the_same_share_a_field_and_all_share_a_timer() -> None:
    with AppBlocks() as page:
        fields = [watch(name, lambda request: 0) for name in ("a", "b", "a")]
        for field in fields:
            field.change(lambda: None, None, None)
    assert fields[0] is fields[2]
    assert [kind for event in page.fns.values() for _, kind in event.targets] == ["change", "change", "change", "tick"]
    assert [field in page.blocks.values() for field in fields] == [True] * 3


def test_the_app_has_one_timer(tmp_path: Path) -> None:
    page = build(Context.create(tmp_path))
    assert sum(isinstance(block, gr.Timer) for block in page.blocks.values()) == 1
    assert sorted(page.watched) == ["adapters", "classify jobs", "control jobs", "gallery", "train jobs"]


def test_a_part_is_watched_inside_a_page() -> None:
    with gr.Blocks(), pytest.raises(AssertionError):
        watch("a", lambda request: 0)
