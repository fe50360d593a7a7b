"""The first screen in Chromium: one click starts a task."""

from __future__ import annotations

from typing import Any

from tests.apps.browser import App, go


def test_one_click_starts_a_task(app: App, page: Any) -> None:
    """On another page with the form's defaults, then on the example photos; the cards go with the first run."""
    page.locator("#showcase-classify").click()
    page.locator("#classify-state").get_by_text("digits").wait_for()
    page.locator("#classify-stop").click()
    go(page, "Train")
    assert page.locator("#showcase").is_visible()
    page.locator("#showcase-train").click()
    page.locator("#train-state").get_by_text("<octopus>, pivotal").wait_for()
    page.locator("#showcase").wait_for(state="hidden")
    page.locator("#train-stop").click()
    jobs = [path.read_text() for path in app.workspace.glob("*/jobs/*/job.json")]
    assert sorted(kind for job in jobs for kind in ("classify", "train") if f'"kind": "{kind}"' in job) == [
        "classify",
        "classify",
        "train",
    ]
