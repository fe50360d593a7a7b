"""Screenshots of every page, empty and filled, wide and narrow, light and dark.

`python -m tests.apps.tour docs/app --control runs/sketch/adapter.safetensors` starts a server, trains and generates on it as a
visitor does, and writes them: about ten minutes on two cores. The control is an adapter of `veneer control train`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.apps.browser import PHONE, WIDE, App, Browser, browser, circle, go, served

WAYS = [*itertools.product((("desktop", WIDE), ("phone", PHONE)), (False, True))]
LONG = 900_000
"""Milliseconds that a job may take."""
CONTROL = "follows-lines"
HIGHEST = 3000
"""Pixels of a screenshot from its top; only the catalog of methods is much higher."""


def prepare(page: Any, control: Path) -> None:
    """Prepares a workspace with two classifiers, a token embedding with its LoRA, and a control adapter."""
    go(page, "Classify")
    page.get_by_label("number input for Epochs").fill("10")
    page.locator("#classify-start").click()
    go(page, "Train")
    page.locator("#train-example").click()
    page.locator("#train-notes").get_by_text("5 photos").wait_for()
    page.locator("#train-preset").get_by_label("balanced").check()
    page.get_by_role("button", name=re.compile("^Settings")).click()
    page.wait_for_function("() => document.querySelector('#train-steps :is(input, textarea)')?.value === '300'")
    page.locator("#train-start").click()
    go(page, "Adapters")
    with tempfile.TemporaryDirectory() as folder:
        page.locator("#adapter-file input[type=file]").set_input_files(
            shutil.copyfile(control, Path(folder) / f"{CONTROL}.safetensors")
        )
        page.locator("#adapter-said").get_by_text("Uploaded as").wait_for()
    go(page, "Train")
    page.locator("#train-state").get_by_text("steps in").wait_for(timeout=LONG)


def train(page: Any) -> None:
    page.locator("#train-example").click()
    page.locator("#train-notes").get_by_text("5 photos").wait_for()
    page.locator("#train-pairs img").first.wait_for()


def generate(page: Any) -> None:
    page.locator("#generate-adapters input").click()
    page.get_by_role("option", name="<octopus>").click()
    page.locator("#generate-prompt textarea").fill("an <octopus>, left, yellow background")
    page.get_by_label("Without and with the adapters").check()
    page.locator("#generate-count input[type=number]").fill("2")
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("4 of 4").wait_for()


def gallery(page: Any) -> None:
    page.locator("#gallery-images .gallery-item button, #gallery-images button.gallery-item").first.click()
    page.locator("#gallery-about dd").first.wait_for()


def control(page: Any) -> None:
    page.locator("#control-choice input").click()
    page.get_by_role("option", name=CONTROL).click()
    circle(page, "#control-sketch canvas")
    page.locator("#control-prompt textarea").fill("an apple, center, white background")
    page.locator("#control-draw").click()
    page.locator("#control-said").get_by_text("1 of 1").wait_for()


def classify(page: Any) -> None:
    page.locator("#classify-job input").click()
    page.get_by_role("option", name=re.compile("lora")).first.click()
    page.locator("#classify-compared table").wait_for()
    page.locator("#classify-mistakes").scroll_into_view_if_needed()
    page.locator("#classify-mistakes img").wait_for()


def adapters(page: Any) -> None:
    page.locator("#adapter input").click()
    page.get_by_role("option", name="<octopus>").click()
    page.locator("#adapter-about td").get_by_text("unet.mid_block").first.wait_for()
    page.locator("#adapter-check").click()
    page.locator("#adapter-fit").get_by_text("Compatible with bundled").wait_for()
    page.get_by_role("button", name="Convert to another format").click()
    page.get_by_role("button", name="Convert", exact=True).click()
    page.locator("#adapter-new a").first.wait_for()


def methods(page: Any) -> None:
    page.get_by_label("Search").fill("low-rank")
    page.locator("#methods-list").get_by_text(re.compile(r"^1?\d methods")).wait_for()  # no longer all
    page.locator("#methods-model input").click()
    page.get_by_role("option").nth(1).click()
    page.locator("#methods-list .counted").first.wait_for()
    page.locator("details.method summary", has=page.get_by_text("lora", exact=True)).click()


FILLED: dict[str, Callable[[Any], None]] = {
    "Train": train, "Generate": generate, "Gallery": gallery, "Control": control,
    "Classify": classify, "Adapters": adapters, "Methods": methods,
}  # fmt: skip


def shoot(page: Any, path: Path, whole: bool = True) -> None:
    """Saves a screenshot of a page at rest, without the effects of mouse and cursor.

    Args:
        whole: in a window as high as the page, so that the bars at the bottom of the window are at the end of their forms.
    """
    window = page.viewport_size
    if whole:
        high = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": window["width"], "height": max(window["height"], high)})
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement?.blur()")
    page.wait_for_timeout(1500)
    with Image.open(io.BytesIO(page.screenshot(full_page=whole))) as image:
        top = image.crop((0, 0, image.width, min(image.height, HIGHEST))) if path.stem.startswith("methods") else image
        top.convert("RGB").save(path, quality=70, optimize=True, progressive=True)
    page.set_viewport_size(window)
    print(path, flush=True)


def tour(app: App, chromium: Browser, out: Path, what: str, fill: bool) -> None:
    """Takes screenshots of every page in every size and color scheme."""
    for (name, size), dark in WAYS:
        page = chromium.open(app, size, dark)
        for tab, filled in FILLED.items():
            go(page, tab)
            if fill:
                filled(page)
            shoot(page, out / f"{tab.lower()}-{what}-{name}-{'dark' if dark else 'light'}.jpg")
            page.reload()
            page.get_by_role("tab").first.wait_for()
        page.context.close()


def main() -> None:
    """The command."""
    asks = argparse.ArgumentParser(description=__doc__)
    asks.add_argument("out", type=Path)
    asks.add_argument("--control", type=Path, required=True)
    asks.add_argument("--at", type=Path, help="folder that keeps the workspace, so that another tour need not train again")
    given = asks.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium, served(given.at or Path(scratch)) as app:
        page = chromium.open(app)
        if not list(app.workspace.glob("*/jobs/*")):
            tour(app, chromium, given.out, "empty", fill=False)
            prepare(page, given.control)
        page.reload()
        train(page)
        page.set_viewport_size({"width": WIDE[0], "height": 1060})
        shoot(page, given.out / "app.jpg", whole=False)
        page.context.close()
        tour(app, chromium, given.out, "filled", fill=True)


if __name__ == "__main__":
    main()
