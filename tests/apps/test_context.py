"""The context: workspaces, job limit, and display of errors and user text."""

from __future__ import annotations

import html
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from veneer.apps.context import Context, escape_markup, show_errors
from veneer.apps.limits import LIMITS

from tests.raising import raises
from veneer.injection import VeneerError


def test_each_login_has_its_own_workspace(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    asks: list[Any] = [None, SimpleNamespace(username=None), SimpleNamespace(username="anna"), SimpleNamespace(username="bob")]
    alone, open_page, anna, bob = (context.workspace(request).folder for request in asks)
    assert alone == open_page
    assert len({alone, anna, bob}) == 3


def test_job_limit_per_user(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    mine = context.workspace(None)
    begun = [context.submit(mine, "train", "a toy", ["personalize"]) for _ in range(LIMITS.jobs)]
    with raises(VeneerError, where="jobs", given=LIMITS.jobs, expected=LIMITS.jobs):
        context.submit(mine, "train", "a toy", ["personalize"])
    assert len(mine.all_jobs()) == LIMITS.jobs
    begun[0].stop()
    assert context.submit(mine, "train", "a toy", ["personalize"]).state == "waiting"


def test_every_punctuation_character_is_escaped() -> None:
    for mark in string.punctuation:
        assert escape_markup(mark).startswith("&"), mark
        assert html.unescape(escape_markup(mark)) == mark
    code = "a\n    code\n\tand more"
    assert not any(line.startswith((" ", "\t")) for line in escape_markup(code).splitlines()), "lines set in are code in Markdown"
    assert html.unescape(escape_markup(code)) == code
    assert escape_markup("猫 and é") == "猫 and é"


@pytest.mark.parametrize("kind", [VeneerError, ValueError, OSError])
def test_errors_are_shown_as_plain_text(kind: type[Exception]) -> None:
    def refuse() -> None:
        raise kind("<b>no</b>")

    with pytest.raises(gr.Error) as caught:
        show_errors(refuse)()
    assert caught.value.message == escape_markup("<b>no</b>")
