"""What tests of pages share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def loops_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gradio opens an event loop for each page that is built outside of one, and leaves it open."""
    opened: list[asyncio.AbstractEventLoop] = []
    new = asyncio.new_event_loop

    def noted() -> asyncio.AbstractEventLoop:
        opened.append(new())
        return opened[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", noted)
    yield
    if opened:
        asyncio.set_event_loop(None)
    for loop in opened:
        if not loop.is_running():
            loop.close()
