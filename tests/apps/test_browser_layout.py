"""Layout and contrast in Chromium, wide and on a phone, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.apps.browser import PHONE, WIDE, App, Browser, bring, go, read_until, tabs, wait_for_rest

CONTRAST = """() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!/rgba\\(.*, 0\\)|transparent/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("input[placeholder], textarea[placeholder]")]
    .filter(each => each.placeholder && each.offsetParent)
    .map(each => {
      const [one, other] = [light(getComputedStyle(each, "::placeholder").color), light(behind(each))].sort((a, b) => b - a);
      return [each.placeholder, (one + 0.05) / (other + 0.05)];
    });
}"""
"""Visible placeholders and their contrast."""


@pytest.mark.parametrize(("size", "dark"), [(WIDE, False), (PHONE, True)], ids=["wide-light", "phone-dark"])
def test_placeholder_contrast_and_visible_main_buttons(app: App, chromium: Browser, size: tuple[int, int], dark: bool) -> None:
    page = chromium.open(app, size, dark)
    found: list[Any] = []
    for name in tabs(page):
        go(page, name)
        wait_for_rest(page)
        found += [(name, *each) for each in page.evaluate(CONTRAST)]
        if button := {"Train": "#train-start", "Generate": "#generate-draw", "Classify": "#classify-start"}.get(name):
            box = page.locator(button).bounding_box()
            assert box["y"] + box["height"] <= size[1], f"{button} is below the fold"
    page.context.close()
    chromium.check()
    assert {name for name, *_ in found} >= {"Train", "Generate"}
    assert not [each for each in found if each[2] < 4.5]


PARTS = """() => [...document.querySelectorAll("h2.step, button.label-wrap")]
  .filter(each => each.offsetParent)
  .map(each => each.innerText.replace(/[◀▼]/g, "").replace(/\\s+/g, " ").trim().replace(/^[123] ?/, ""))"""
"""Visible steps and accordions of the open page, in their order, without the numbers of the steps."""
FORM = [
    "Photos 3 to 20 of one subject or style",
    "Subject the name that prompts use",
    "More concepts in this run",
    "Training",
    "Settings",
    "Method options",
    "Start from or train on top of adapters",
    "Config file and other options",
]
"""Parts of the training form without photos."""


def test_parts_of_the_training_form(app: App, chromium: Browser) -> None:
    """Each accordion is in the step that it belongs to; captions appear with the photos."""
    page = chromium.open(app)
    assert read_until(page, PARTS, FORM) == FORM
    page.locator("#train-example").click()
    with_photos = [FORM[0], "Captions and crops", *FORM[1:]]
    assert read_until(page, PARTS, with_photos) == with_photos
    page.context.close()
    chromium.check()


def test_start_on_a_phone_scrolls_to_the_run(app: App, chromium: Browser) -> None:
    """Labels of method options are not truncated."""
    page = chromium.open(app, PHONE)
    page.locator("#train-example").click()
    page.locator("#train-notes").get_by_text("5 photos").wait_for()
    page.get_by_role("button", name="Method options").click()
    label = page.locator("label", has_text="rslora").first
    label.wait_for()
    wait_for_rest(page)
    for node in page.locator(".options label.checkbox-container").all():
        if node.is_visible():
            assert node.evaluate("each => each.scrollWidth <= each.clientWidth + 1"), node.inner_text()
            assert node.evaluate("each => each.closest('.block').offsetWidth >= 200"), node.inner_text()
    page.get_by_role("button", name="Method options").click()
    page.locator("#train-start").click()
    page.locator("#train-state").get_by_text("pivotal").wait_for()
    page.wait_for_function(
        "() => { const y = document.getElementById('train-state').getBoundingClientRect().top; return y >= 0 && y < innerHeight }"
    )
    look = page.locator("#train-job input").evaluate("e => [getComputedStyle(e).textOverflow, getComputedStyle(e).paddingRight]")
    assert look == ["ellipsis", "28px"], "a long title ends before the arrow"
    page.locator("#train-stop").click()
    page.locator("#train-state").get_by_text("was stopped").wait_for()
    page.context.close()
    chromium.check()


def test_missing_adapter_of_a_token_is_offered(page: Any, brought: Path) -> None:
    """Generation waits until the user chooses to continue with or without the adapter."""
    bring(page, brought / "my-lora.safetensors")
    go(page, "Generate")
    page.locator("#generate-prompt textarea").fill("a <toy>, left, blue background")
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("which is not selected").wait_for()
    assert page.locator("#generate-gallery img").count() == 0
    page.locator("#generate-use").click()
    page.locator("#generate-state").get_by_text("1 of 1").wait_for()
    assert page.get_by_label("Strength of my-lora").first.is_visible()
    assert not page.locator("#generate-use").is_visible()
    page.locator("#generate-prompt textarea").fill("a <toy>, left, " + "blue background, " * 12 + "a lamp")
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("Left out").wait_for()
    assert "a lamp" in page.locator("#generate-state").inner_text()
