"""Fixtures of the tests of the app."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.apps.adapters import perturbed
from tests.apps.browser import App, Browser, browser, served
from veneer import base_models
from veneer.formats import native


@pytest.fixture(autouse=True)
def loops_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the event loops that Gradio opens when a page is built outside of one."""
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
    """Of one module: while Playwright runs, no other event loop can."""
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def app(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The running app of one module. Depends on `chromium`, so that no server is started without a browser.

    It does not run on: its training runs and the polls of its server would slow down other tests.
    """
    with served(tmp_path_factory.mktemp("app")) as found:
        yield found


@pytest.fixture
def page(app: App, chromium: Browser) -> Iterator[Any]:
    """A page of the app; it must have no errors at the end."""
    found = chromium.open(app)
    yield found
    found.context.close()
    chromium.check()


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the bundled model with random weights: a LoRA with a trigger token, and a ControlNet for canny maps."""
    folder = tmp_path_factory.mktemp("brought")
    told = {"lora": {"concept": "<toy>", "class_word": "cat"}, "controlnet": {"condition": "canny"}}
    for method, provenance in told.items():
        attached = perturbed(base_models.load("bundled"), method, 0.02)
        native.save(attached, folder / f"my-{method}.safetensors", {"base": "bundled", **provenance})
    return folder
