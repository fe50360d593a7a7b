"""The app in a browser: a server process on a free port, and Chromium."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio
import pytest
from veneer.apps.pages import pages

PATIENCE = 180
"""Timeout of a server or page in seconds."""
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")
"""Programs of Debian and Ubuntu; the first one has no window and takes a sixth less time."""
CHROMIUM = os.environ.get("VENEER_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
AXE = Path(os.environ.get("VENEER_AXE") or Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js")
"""The accessibility checker: `npm install --no-save axe-core`, or a path of its script."""
GRADIO_ASSETS = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
"""Scripts of Gradio's components."""
WIDE, PHONE = (1280, 800), (390, 844)


@dataclass
class App:
    """A server.

    Args:
        folder: its current folder, in which its workspace lies. `words`: after `veneer app`.
    """

    folder: Path
    words: Sequence[str] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def workspace(self) -> Path:
        """Workspace folder of all users."""
        return self.folder / "veneer-workspace"

    def start(self) -> App:
        """Starts the server, on its previous port after a restart, and waits until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        command = [
            sys.executable,
            "-c",
            "from veneer_command import console; console()",
            "app",
            "--port",
            str(self.port),
            "--no-browser",
            *self.words,
        ]
        with (self.folder / "server.txt").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + PATIENCE
        while not self._answers():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.1)
        return self

    def log(self) -> str:
        """Output of the server."""
        return (self.folder / "server.txt").read_text(errors="replace")

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Kills the server; its jobs continue."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(PATIENCE)

    def end(self) -> None:
        """Kills the server and its jobs, which are separate sessions."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(PATIENCE)
        self.kill_jobs()

    def kill_jobs(self) -> None:
        """Kills the processes of all jobs, also of one that has only begun and has no file with its process id."""
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended
                if f"{self.workspace}/".encode() in file.read_bytes():
                    os.kill(int(file.parent.name), signal.SIGKILL)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return f"veneer is at http://127.0.0.1:{self.port}" in self.log()
        return False


@contextlib.contextmanager
def served(folder: Path, *words: str) -> Iterator[App]:
    """A running app with a new workspace; it and its jobs are killed at the end."""
    app = App(folder, words)
    try:
        yield app.start()
    finally:
        app.end()


class Small:
    """The small server as a process, see `small_server`.

    Args:
        root: its folder. `login`: who may come in. `words`: what its page shows as a visitor's.
    """

    def __init__(self, root: Path, login: str | None = None, words: Sequence[str] = ()) -> None:
        self.root = root
        (root / "words.json").write_text(json.dumps(list(words)))
        command = [sys.executable, "-m", "tests.apps.small_server", str(root), *([login] if login else [])]
        with (root / "server.txt").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=log, stderr=log)
        end = time.monotonic() + PATIENCE
        while not (root / "address").exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise AssertionError((root / "server.txt").read_text())
            time.sleep(0.1)
        self.address = (root / "address").read_text().rstrip("/")

    def close(self) -> None:
        """Ends the server."""
        self.process.kill()
        self.process.wait(PATIENCE)


@dataclass
class Browser:
    """Chromium, and the errors of its pages.

    Args:
        errors: of the console and of scripts, and answers of 400 and more. `elsewhere`: addresses that are no app's.
    """

    chromium: Any
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def open(self, app: App, size: tuple[int, int] = WIDE, dark: bool = False, **named: Any) -> Any:
        """Opens the app in a new browser context, as another user, with long timeouts."""
        theme = "dark" if dark else "light"
        context = self.chromium.new_context(
            viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=theme, **named
        )
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        self.watch(page)
        page.goto(f"{app.address}/?__theme={theme}")
        wait_for_pages(page)
        return page

    def reload(self, page: Any) -> None:
        """Reloads a page, and drops its errors about closed connections."""
        before = self.errors[:]
        page.reload()
        wait_for_pages(page)
        self.errors[:] = before

    def watch(self, page: Any) -> None:
        """Records the errors and external requests of a page."""
        page.on("console", lambda told: self.errors.append(f"{told.type}: {told.text}") if told.type == "error" else None)
        page.on("pageerror", lambda error: None if is_of_line_plot(error) else self.errors.append(f"script: {error}"))
        page.on("request", lambda asked: self.elsewhere.append(asked.url) if _elsewhere(asked.url) else None)

    def check(self) -> None:
        """Asserts that there were no errors and no external requests, and clears them."""
        errors, elsewhere = self.errors[:], self.elsewhere[:]
        self.errors.clear()
        self.elsewhere.clear()
        assert not errors, errors
        assert not elsewhere, elsewhere


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips the test if it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'veneer[test]'")
    if CHROMIUM is None:
        pytest.skip("no chromium: install Debian's package `chromium-headless-shell`, or name its program in VENEER_CHROMIUM")
    with playwright.sync_playwright() as play:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]  # as root, and in a container
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=PATIENCE * 1000)
        try:
            yield Browser(chromium)
        finally:
            chromium.close()


def is_of_line_plot(error: Any) -> bool:
    """True for an error of Gradio's line plot, which measures its element after that has left the page.

    Neither its size observer nor its asynchronous drawing ends with the element. The file of its script is named by a hash, so
    it is known by the function of Vega that it calls.
    """
    if error.message != "Cannot read properties of null (reading 'offsetWidth')":
        return False
    frames = re.findall(r"^ *at .*$", error.stack or "", re.MULTILINE)
    script = re.search(r"/assets/(Index-[\w-]+\.js):", frames[0]) if frames else None
    file = GRADIO_ASSETS / script[1] if script else None
    return not frames or (file is not None and file.is_file() and "runAsync" in file.read_text(encoding="utf-8"))


def findings(page: Any) -> list[str]:
    """Serious and critical findings of axe-core; skips the test if it is not installed."""
    if not AXE.is_file():
        pytest.skip("no axe-core: npm install --no-save axe-core, or name its axe.min.js in VENEER_AXE")
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(AXE.read_text())
    found = page.evaluate("async () => (await axe.run()).violations")
    grave = [each for each in found if each["impact"] in ("serious", "critical")]
    return [f"{each['id']}: {each['help']}: {node['html'][:200]}" for each in grave for node in each["nodes"]]


def circle(page: Any, where: str) -> None:
    """Draws a circle of half the canvas height in its center, with the mouse."""
    box = box_at_rest(page, where)
    x, y, radius = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, min(box["width"], box["height"]) / 4
    page.mouse.move(x + radius, y)
    page.mouse.down()
    for turn in range(1, 41):
        angle = turn * math.tau / 40
        page.mouse.move(x + radius * math.cos(angle), y + radius * math.sin(angle))
    page.mouse.up()


def box_at_rest(page: Any, where: str) -> dict[str, float]:
    """The bounding box of an element once it has not moved for half a second: answers of the server may shift the layout."""
    canvas = page.locator(where).first
    canvas.scroll_into_view_if_needed()
    box, since = canvas.bounding_box(), time.monotonic()
    deadline = since + PATIENCE
    while time.monotonic() - since < 0.5:
        page.wait_for_timeout(50)
        if (now := canvas.bounding_box()) != box:
            box, since = now, time.monotonic()
        assert time.monotonic() < deadline, f"{where} does not come to rest"
    return box


def bring(page: Any, file: Path) -> None:
    """Uploads an adapter file on the page Adapters."""
    go(page, "Adapters")
    page.locator("#adapter-file input[type=file]").set_input_files(file)
    page.locator("#adapter-said").get_by_text(f"Uploaded as {file.stem}").wait_for()


def wait_for_pages(page: Any) -> None:
    """Waits for the last tab, and for the last parts of the form and of the runs of the first page."""
    page.get_by_role("tablist").first.get_by_role("tab", name=pages()[-1].name, exact=True).wait_for()
    for part in ("#train-start", "#train-state"):
        page.locator(part).wait_for()


def read_until(page: Any, script: str, expected: Any) -> Any:
    """Evaluates a script until it returns the expected value, for at most `PATIENCE` seconds. Returns its last value.

    For lists of elements: a page shows its first elements before it has all.
    """
    deadline = time.monotonic() + PATIENCE
    while (value := page.evaluate(script)) != expected and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    return value


def wait_for_rest(page: Any) -> None:
    """Waits until the number of elements of the page has not changed for half a second."""
    count, since = -1, time.monotonic()
    deadline = since + PATIENCE
    while time.monotonic() - since < 0.5:
        page.wait_for_timeout(50)
        if (now := page.evaluate("() => document.querySelectorAll('*').length")) != count:
            count, since = now, time.monotonic()
        assert time.monotonic() < deadline, "the page does not come to rest"


def tabs(page: Any) -> list[str]:
    """Names of the pages of the app."""
    return [name.strip() for name in page.get_by_role("tablist").first.get_by_role("tab").all_inner_texts()]


def go(page: Any, name: str) -> None:
    """Opens a page by its tab."""
    page.get_by_role("tablist").first.get_by_role("tab", name=name, exact=True).click()


def free_port() -> int:
    """A free port."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _elsewhere(address: str) -> bool:
    return not address.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))
