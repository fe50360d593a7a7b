"""Main workflow of each page in Chromium, from the first click to the file, without errors."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import veneer
from tests.apps.browser import App, Browser, bring, circle, findings, go
from veneer import base_models
from veneer.config_file import read_table
from veneer.formats import load_all
from veneer.training.report.png_metadata import read_settings

QUICKER = """
prompts = ["a {concept}, center, white background"]
drift_prompts = ["an apple, center, white background"]
preview_steps = 10
"""
"""Other options that shorten previews and evaluation, most of a short run."""


def pictures(page: Any, where: str, count: int) -> list[Any]:
    """Images of a gallery, as received by the browser, once there are exactly `count`."""
    found = []
    images = f"{where} .gallery-item img"
    page.wait_for_function("([images, count]) => document.querySelectorAll(images).length === count", arg=[images, count])
    for source in page.locator(images).evaluate_all("all => all.map(each => each.src)"):
        answer = page.request.get(source)
        assert answer.ok, source
        found.append(answer.body())
    return found


def test_config_file_fills_the_form(page: Any, tmp_path: Path) -> None:
    """The events that follow the change of the method leave the values of the file; the saved form is that file again."""
    (tmp_path / "run.yaml").write_text(
        "concept: <cup>\nclass_word: cup\nmethod: lora\nsteps: 7\nwarmup: 3\nphotos: /srv\nlora: {rank: 5}"
    )
    page.get_by_text("Settings", exact=True).click()
    page.get_by_text("Config file and other options", exact=True).click()
    page.locator("#train-config input[type=file]").set_input_files(tmp_path / "run.yaml")
    page.locator("#train-config-note").get_by_text("does not accept it from a file: photos.").wait_for()
    assert page.locator("#train-concept input, #train-concept textarea").input_value() == "<cup>"
    assert page.locator("#train-method input").input_value() == "lora"
    steps = page.locator("#train-steps input, #train-steps textarea")
    for _ in range(5):  # the events that follow come within a second or two
        page.wait_for_timeout(1000)
        assert steps.input_value() == "7"
    page.locator("#train-config-save").click()
    page.locator("#train-config-file a").first.wait_for()
    assert downloaded(page, "#train-config-file", tmp_path) == ["config.toml"]
    table = read_table(tmp_path / "config.toml")
    assert (table["concept"], table["steps"], table["warmup"], table["lora"]) == ("<cup>", 7, 3, {"rank": 5})
    assert not findings(page)


def test_train_on_four_photos(app: App, page: Any, chromium: Browser, tmp_path: Path) -> None:
    """Preset quick: progress, loss curve and previews, seen again after a reload and in a second tab that generates an image
    meanwhile; then the image grid, metrics, and files for all programs."""
    photos = sorted(base_models.examples().glob("*.png"))[:4]
    page.locator("#train-photos input[type=file]").set_input_files(photos)
    page.locator("#train-notes").get_by_text("4 photos, no problems found.").wait_for()
    page.locator("#train-concept input, #train-concept textarea").fill("<octopus>")
    page.locator("#train-word input, #train-word textarea").fill("fish")
    assert page.locator("#train-preset").get_by_label("quick").is_checked()
    page.get_by_text("Config file and other options", exact=True).click()
    page.locator("#train-other textarea").fill(QUICKER)
    page.locator("#train-start").click()
    state = page.locator("#train-state")
    state.get_by_text(re.compile(r"trains: step \d+ of 100")).wait_for()
    assert int(page.locator("#train-progress progress").get_attribute("max")) == 100
    page.locator("#train-preview img").wait_for()
    chromium.reload(page)
    job = re.compile("<octopus>, pivotal (trains|generates|saves|evaluates|is done|has ended)")
    page.locator("#train-state").get_by_text(job).wait_for()
    page.locator("#train-loss svg, #train-loss canvas").first.wait_for()
    other = chromium.open(app)
    other.locator("#train-state").get_by_text(job).wait_for()
    go(other, "Generate")
    other.get_by_role("button", name="an apple, center").click()
    other.locator("#generate-state").get_by_text("1 of 1").wait_for()
    other.context.close()
    state.get_by_text("100 steps in").wait_for()
    pairs = page.locator("#train-pairs img")
    assert pairs.first.bounding_box()["width"] > 120, "large enough to be seen"
    assert pairs.evaluate_all("all => all.map(each => each.alt)")[:2] == [
        f"{each}: a <octopus>, center, white background" for each in ("Base model", "With the adapter")
    ]
    page.locator("#train-all button").first.click()
    page.locator("#train-sheet img").wait_for()
    figures = page.locator("#train-verdict").inner_text()
    with_it, without = map(float, re.search(r"photos is ([\d.-]+) with the adapter and ([\d.-]+) without", figures).groups())
    assert with_it > without + 0.2
    assert not page.locator("#train-files .label-clear-button").first.is_visible(), "a result cannot be removed from the list"
    page.locator("#train-kohya").click()
    page.locator("#train-kohya-file a").nth(1).wait_for()
    assert not findings(page)
    for part, names in {
        "#train-files": [
            "config.toml",
            "octopus-pivotal.safetensors",
            "pytorch_lora_weights.safetensors",
            "learned_embeds.safetensors",
        ],
        "#train-kohya-file": ["octopus-pivotal-comfyui-a1111.safetensors", "octopus.safetensors"],
    }.items():
        assert downloaded(page, part, tmp_path, len(names)) == sorted(names)
    page.locator("#train-generate").click()
    assert "<octopus>" in page.locator("#generate-prompt textarea").input_value()
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("4 of 4").wait_for()
    told = read_settings(io.BytesIO(pictures(page, "#generate-gallery", 4)[0]))  # type: ignore[arg-type]
    assert [each["file"].split(" ")[0] for each in told["adapters"]] == ["<octopus>,"]
    attached = load_all(base_models.load("bundled"), tmp_path / "octopus-pivotal.safetensors")
    assert {each.method.name for each in attached} == {"textual_inversion", "lora"}
    assert load_file(tmp_path / "octopus.safetensors")


def downloaded(page: Any, part: str, folder: Path, count: int = 1) -> list[str]:
    """Downloads all files of a component to a folder, once there are `count`; returns their names."""
    names = []
    page.locator(f"{part} a").nth(count - 1).wait_for()
    for link in page.locator(f"{part} a").all():
        with page.expect_download() as told:
            link.click()
        told.value.save_as(folder / told.value.suggested_filename)
        names.append(told.value.suggested_filename)
    return sorted(names)


def test_generate_with_and_without(app: App, page: Any, brought: Path, tmp_path: Path) -> None:
    """With an uploaded adapter and the base model; then its settings are read from the downloaded image."""
    bring(page, brought / "my-lora.safetensors")
    go(page, "Generate")
    page.locator("#generate-prompt textarea").fill("a <toy>, left, blue background")
    page.locator("#generate-adapters input").click()
    page.get_by_role("option", name="my-lora").click()
    page.get_by_label("Strength of my-lora").first.wait_for()
    page.get_by_label("Without and with the adapters").check()
    page.locator("#generate-seed input").fill("7")
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("2 of 2").wait_for()
    without, with_it = pictures(page, "#generate-gallery", 2)
    assert without != with_it
    (tmp_path / "with.png").write_bytes(with_it)
    told = read_settings(tmp_path / "with.png")
    assert told["prompt"] == "a <toy>, left, blue background"
    assert (told["seed"], told["adapters"]) == (7, [{"file": "my-lora", "scale": 1.0}])
    assert not findings(page)
    page.locator("#generate-prompt textarea").fill("something else")
    page.get_by_text("Reuse the settings of an image file").click()
    page.locator("#generate-brought input[type=file]").set_input_files(tmp_path / "with.png")
    page.locator("#generate-state").get_by_text("The settings are filled in").wait_for()
    assert page.locator("#generate-prompt textarea").input_value() == "a <toy>, left, blue background"
    page.get_by_label("With the adapters", exact=True).check()
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("1 of 1").wait_for()
    assert [each == with_it for each in pictures(page, "#generate-gallery", 1)] == [True], "the same image again"


def test_generate_from_a_sketch(app: App, page: Any, brought: Path, tmp_path: Path) -> None:
    """The brush is selected initially, so the first stroke draws."""
    bring(page, brought / "my-controlnet.safetensors")
    go(page, "Control")
    page.locator("#control-choice input").click()
    page.get_by_role("option", name="my-controlnet · follows canny").click()
    circle(page, "#control-sketch canvas")
    page.locator("#control-draw").click()
    page.locator("#control-said").get_by_text("1 of 1").wait_for()
    followed, without, with_it = pictures(page, "#control-gallery", 3)
    assert without != with_it
    (tmp_path / "map.png").write_bytes(followed)
    with Image.open(tmp_path / "map.png") as image:
        lines = torch.tensor(np.array(image.convert("L"))) > 127
    high, wide = (lines.any(1).nonzero().flatten(), lines.any(0).nonzero().flatten())
    assert 0.3 < (high.max() - high.min()) / image.height < 0.8, "a circle of half the sheet"
    assert abs(int(high.max() - high.min()) - int(wide.max() - wide.min())) <= 4
    assert not lines[image.height // 2, image.width // 2]
    assert not findings(page)


def test_train_on_digits_and_classify(app: App, page: Any) -> None:
    """Live accuracy, confusion matrix, worst mistakes, a prediction, and downloads."""
    go(page, "Classify")
    page.locator("#classify-methods .token-remove").nth(1).click()  # of LoRA, which takes longer
    page.get_by_label("number input for Epochs").fill("5")
    page.locator("#classify-start").click()
    page.locator("#classify-words").get_by_text(re.compile(r"Accuracy [\d.]+%")).wait_for()
    right = float(re.search(r"Accuracy ([\d.]+)%", page.locator("#classify-words").inner_text()).group(1))
    assert right > 60
    for name in ("confusion", "curves", "mistakes"):
        page.locator(f"#classify-{name}").scroll_into_view_if_needed()
        page.locator(f"#classify-{name} img").wait_for()
    (run,) = (path.parent for path in app.workspace.glob("*/jobs/*/run/model.json"))
    digit = digit_of(run)
    page.locator("#classify-image input[type=file]").set_input_files(digit)
    page.locator("#classify-answer h2, #classify-answer [data-testid=label-output-value]").first.wait_for()
    assert page.locator("#classify-answer").inner_text().count("%") >= 2
    assert not findings(page)


def digit_of(run: Path) -> Path:
    """The first digit of the built-in set as an image file."""
    from sklearn.datasets import load_digits

    path = run.parent / "digit.png"
    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).resize((64, 64)).save(path)
    return path


def test_inspect_and_convert_a_file(page: Any, brought: Path, tmp_path: Path) -> None:
    file = shutil.copyfile(brought / "my-lora.safetensors", tmp_path / "to convert.safetensors")
    go(page, "Adapters")
    page.locator("#adapter-file input[type=file]").set_input_files(file)
    page.locator("#adapter-said").get_by_text("Uploaded as to-convert").wait_for()
    page.locator("#adapter-about td").get_by_text("unet.mid_block").first.wait_for()
    page.locator("#adapter-check").click()
    page.locator("#adapter-fit").get_by_text("Compatible with bundled").wait_for()
    page.get_by_role("button", name="Convert to another format").click()
    page.get_by_role("button", name="Convert", exact=True).click()
    page.locator("#adapter-report textarea").wait_for()
    page.locator("#adapter-new a").first.wait_for()
    assert downloaded(page, "#adapter-new", tmp_path) == ["to-convert-kohya.safetensors"]
    before, after = (veneer.load(base_models.load("bundled"), path) for path in (file, tmp_path / "to-convert-kohya.safetensors"))
    sites = {site.path for site, _ in before.parts.values()}
    assert {site.path for site, _ in after.parts.values()} == sites
    assert not findings(page)


def test_keyboard_navigation(page: Any) -> None:
    """From the top of the first page to another page, a prompt and its image."""

    def tab_to(found: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("found => document.activeElement.matches(found)", found):
                return
        raise AssertionError(f"no way to {found}")

    tab_to("[role=tab]")
    page.keyboard.press("ArrowRight")
    if not page.evaluate("() => document.activeElement.textContent.trim() === 'Generate'"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#generate-draw").wait_for()
    tab_to("#generate-prompt textarea")
    page.keyboard.type("an apple, center, white background")
    tab_to("#generate-draw")
    page.keyboard.press("Enter")
    page.locator("#generate-state").get_by_text("1 of 1").wait_for()


def test_image_from_the_gallery_is_used_again(app: App, page: Any, tmp_path: Path) -> None:
    """Its settings, its file with the settings in it, the form that it fills, and its deletion."""
    go(page, "Generate")
    page.locator("#generate-prompt textarea").fill("a dog, center, green background")
    page.locator("#generate-seed input").fill("11")
    page.locator("#generate-draw").click()
    page.locator("#generate-state").get_by_text("1 of 1").wait_for()
    page.locator("#generate-prompt textarea").fill("something else")
    go(page, "Gallery")
    page.locator("#gallery-images").get_by_text("seed 11").wait_for()  # the newest image comes with the next update
    page.locator("#gallery-images .gallery-item button, #gallery-images button.gallery-item").first.click()
    page.locator("#gallery-about").get_by_text("a dog, center, green background").wait_for()
    with page.expect_download() as told:
        page.locator("#gallery-download").click()
    told.value.save_as(tmp_path / "again.png")
    assert read_settings(tmp_path / "again.png")["seed"] == 11
    assert not findings(page)
    page.locator("#gallery-again").click()
    page.locator("#generate-state").get_by_text("The settings are filled in").wait_for()
    assert page.locator("#generate-prompt textarea").input_value() == "a dog, center, green background"
    assert page.locator("#generate-seed input").input_value() == "11"
    go(page, "Gallery")
    page.on("dialog", lambda dialog: dialog.accept())
    before = len([*app.workspace.glob("*/images/*.png")])
    page.locator("#gallery-delete").click()
    page.locator("#gallery-details").wait_for(state="hidden")
    assert len([*app.workspace.glob("*/images/*.png")]) == before - 1


def test_search_methods(page: Any) -> None:
    go(page, "Methods")
    page.get_by_label("Search").fill("butterfly")
    page.locator("details.method summary code").get_by_text("boft").wait_for()
    page.locator("#methods-list").get_by_text("1 method").wait_for()
    page.locator("details.method summary").click()
    assert "Kind" in page.locator("details.method").inner_text()
    assert not findings(page)
