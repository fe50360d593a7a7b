"""What tests of pages share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.apps.browser import App, Browser, browser, served


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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def app(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """After `chromium`, so that no server is started where there is no browser."""
    with served(tmp_path_factory.mktemp("app")) as found:
        yield found


@pytest.fixture
def page(app: App, chromium: Browser) -> Iterator[Any]:
    """A visitor's, on which nothing has gone wrong at the end."""
    found = chromium.open(app)
    yield found
    found.context.close()
    chromium.check()
