"""Failures in Chromium: reloads, stops, crashes and invalid files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from safetensors import safe_open
from veneer.apps.jobs import Job

from tests.apps.browser import App, Browser, go
from veneer import base_models


def train(page: Any, concept: str, how_long: str, checkpoint_every: int | None = None) -> None:
    """Starts a run on the example photos.

    Args:
        checkpoint_every: steps between checkpoints (default: the preset's).
    """
    page.locator("#train-example").click()
    page.locator("#train-notes").get_by_text("5 photos").wait_for()
    page.locator("#train-concept input, #train-concept textarea").fill(concept)
    page.locator("#train-preset").get_by_label(how_long).check()
    steps = {"quick": "100", "balanced": "300"}[how_long]
    page.get_by_role("button", name=re.compile("^Settings")).click()
    page.wait_for_function("n => document.querySelector('#train-steps :is(input, textarea)')?.value === n", arg=steps)
    if checkpoint_every is not None:
        page.get_by_role("button", name="More settings").click()
        page.locator("#train-checkpoint-every :is(input, textarea)").fill(str(checkpoint_every))
    page.locator("#train-start").click()


def step(page: Any) -> int:
    """Step of the selected job, once training has started."""
    words = page.locator("#train-state").get_by_text(re.compile(r"trains: step \d+ of"))
    words.wait_for()
    return int(re.search(r"step (\d+) of", words.inner_text()).group(1))


def test_stop_resume_and_crash_recovery_in_two_tabs(app: App, chromium: Browser) -> None:
    """Two tabs show one job. After a crash of the server the job continues; after a crash of both it resumes from a checkpoint.
    A stop in one tab shows in the other, saves a usable adapter, and the job can be resumed and deleted."""
    first, second = chromium.open(app), chromium.open(app)
    train(first, "<beast>", "balanced", checkpoint_every=10)
    (folder,) = wait_for(first, lambda: list(app.workspace.glob("*/jobs/*")))
    job = Job(folder)
    second.locator("#train-state").get_by_text("<beast>, pivotal trains").wait_for()
    reached = step(first)

    app.kill()
    assert job.state == "running", "without a server"
    app.start()
    wait_for(first, lambda: step(first) > reached)  # the open page comes back by itself

    wait_for(first, lambda: list(job.run.glob("checkpoint-*/manifest.json")))
    app.kill()
    os.kill(json.loads((folder / "process.json").read_text())["pid"], signal.SIGKILL)
    wait_for(first, lambda: job.state == "waiting")
    before = len(job.progress())
    app.start()
    wait_for(first, lambda: len(job.progress()) > before)
    begun = json.loads((folder / "begun.json").read_text())["steps"]
    assert len(begun) == 2
    assert begun[1] > 0, "not from the start"
    fresh = chromium.open(app)
    assert step(fresh) > begun[1]
    fresh.context.close()

    second.locator("#train-stop").click()
    for tab in (second, first):
        tab.locator("#train-state").get_by_text("The trained weights are saved; it can be resumed.").wait_for()
    with safe_open(job.run / "adapter.safetensors", "pt") as file:
        assert list(file.keys())
    first.locator("#train-files a").first.wait_for()
    go(first, "Generate")
    first.locator("#generate-adapters input").click()
    first.get_by_role("option", name="<beast>, pivotal").click()
    first.locator("#generate-prompt textarea").fill("a <beast>, left, blue background")
    first.locator("#generate-draw").click()
    first.locator("#generate-state").get_by_text("1 of 1").wait_for()

    stopped = job.progress()[-1].step
    second.locator("#train-on").click()
    wait_for(second, lambda: job.state == "running" and job.progress()[-1].step > stopped)
    second.locator("#train-stop").click()
    second.on("dialog", lambda dialog: dialog.accept())
    second.locator("#train-delete").click()
    second.locator("#train-state").get_by_text("No run yet.").wait_for()
    assert not folder.exists()
    for tab in (first, second):
        tab.context.close()
    chromium.errors[:] = [error for error in chromium.errors if not lost(error)]
    chromium.check()


def lost(error: str) -> bool:
    """Whether an error is one of a lost connection."""
    gone = (
        "net::ERR_CONNECTION",
        "net::ERR_INCOMPLETE_CHUNKED",
        "net::ERR_CONTENT_LENGTH_MISMATCH",  # a file whose transfer the crash cut off
        "net::ERR_EMPTY",
        "network error",
        "Connection err",
        "Failed to fetch",  # streams, and parts of Gradio's page that are loaded when they are first needed
        "Unable to preload CSS",  # styles of these parts
    )
    return any(words in error for words in gone)


def wait_for(page: Any, happens: Any) -> Any:
    """Polls a condition on the disk while the page stays open."""
    for _ in range(1800):
        with contextlib.suppress(OSError, IndexError):
            if found := happens():
                return found
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen")


def told(page: Any, words: str) -> None:
    """Checks that an error appears, and closes it."""
    error = page.get_by_test_id("toast-text").filter(has_text=words).first
    error.wait_for()
    assert "Traceback" not in error.inner_text()
    assert "/tmp/" not in error.inner_text()
    page.get_by_test_id("toast-close").first.click()


def draws(page: Any) -> None:
    """The app still works: an image is generated."""
    go(page, "Generate")
    page.get_by_role("button", name="an apple, center").click()
    page.locator("#generate-state").get_by_text("1 of 1").wait_for()


def test_invalid_photos(page: Any, tmp_path: Path) -> None:
    """Invalid files are reported with their problems beside valid photos, and rejected alone."""
    (tmp_path / "letter.png").write_text("Dear Sir, this is no picture.")
    (tmp_path / "huge.png").write_bytes(huge(20_000, 15_000))
    (tmp_path / "page.png").write_text("<html><script>alert(1)</script></html>")
    good = sorted(base_models.examples().glob("*.png"))[:3]
    photos = page.locator("#train-photos input[type=file]")
    photos.set_input_files([*good, tmp_path / "letter.png", tmp_path / "huge.png", tmp_path / "page.png"])
    notes = page.locator("#train-notes")
    notes.get_by_text("3 photos.").wait_for()
    for name, why in (("letter.png", "Dear Sir"), ("huge.png", "300,000,000"), ("page.png", "web page")):
        assert re.search(rf"{name}[^\n]*{why}", notes.inner_text()), notes.inner_text()
    page.locator("#train-photos").get_by_label("Clear").click()
    photos.set_input_files([tmp_path / "letter.png"])
    told(page, "letter.png")
    draws(page)


def huge(width: int, height: int) -> bytes:
    """A complete single-color PNG of a few kilobytes."""
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8) * 1000) for _ in range(height // 1000)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_zip_with_paths_outside_its_folder(app: App, page: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for number, photo in enumerate(sorted(base_models.examples().glob("*.png"))):
            archive.write(photo, f"../../../{'cat' if number % 2 else 'dog'}/{number}.png")
    before = [*app.workspace.glob("*/given/*")], {*app.folder.rglob("*.png")}
    go(page, "Classify")
    page.get_by_label("My images, in a zip").check()
    page.locator("#classify-zip input[type=file]").set_input_files(tmp_path / "pets.zip")
    page.locator("#classify-zip").get_by_text("pets").first.wait_for()
    page.locator("#classify-start").click()
    told(page, "..")
    unpacked = [path for path in app.folder.rglob("*.png") if "cache" not in path.parts and path not in before[1]]
    assert [*app.workspace.glob("*/given/*")] == before[0]
    assert not unpacked
    draws(page)


def test_pickle_named_safetensors(app: App, page: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run by a pickle"),)

    (tmp_path / "style.safetensors").write_bytes(pickle.dumps(Evil()))
    go(page, "Adapters")
    page.locator("#adapter-file input[type=file]").set_input_files(tmp_path / "style.safetensors")
    said = page.locator("#adapter-said")
    said.get_by_text("Rejected: style.safetensors").wait_for()
    assert "/tmp/" not in said.inner_text()
    assert not (tmp_path / "run by a pickle").exists()
    assert not list(app.workspace.glob("*/adapters/*"))
    page.locator("#adapter-example").click()
    page.locator("#adapter-about").get_by_text("unet.mid_block").first.wait_for()
    draws(page)


def test_html_in_user_text(page: Any, app: App) -> None:
    """Prompts, their truncated text, and concepts in titles are shown literally."""
    evil = "<img src=x onerror=\"document.title='owned'\"> **bold** <b>cat</b>"
    go(page, "Generate")
    page.locator("#generate-prompt textarea").fill("<b>*cat*</b>")
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("1 of 1").wait_for()
    page.locator("#generate-prompt textarea").fill(evil)
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("**bold** <b>cat</b>”").wait_for()
    assert page.locator("img[src=x]").count() == 0
    go(page, "Train")
    train(page, evil, "quick")
    state = page.locator("#train-state")
    state.get_by_text(evil[:50]).first.wait_for()
    assert state.locator("img").count() == 0
    page.locator("#train-stop").click()
    state.get_by_text("was stopped").wait_for()
    assert page.title() == "veneer"
    assert not [path for path in app.workspace.rglob("*") if "<" in path.name and "cache" not in path.parts]
    draws(page)
