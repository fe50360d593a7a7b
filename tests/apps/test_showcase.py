"""The first screen: images of every task, small and with alternative texts."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from veneer.apps.jobs import create_job
from veneer.apps.pages.personalize.comparison import comparison_html
from veneer.apps.pages.showcase import showcase

from veneer.atomic_files import write_json


def images(html: str) -> list[tuple[str, Image.Image]]:
    """Alternative texts and images of HTML."""
    found = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]+)"', html)
    assert len(found) == html.count("<img"), "each has an alternative text"
    return [(alt, Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in found]


@pytest.mark.parametrize(
    ("part", "count"),
    [("subject_card", 11), ("subject_strip", 4), ("control_card", 6), ("classify_card", 10), ("prompt_examples", 4)],
)
def test_cards_show_real_images(part: str, count: int) -> None:
    html = getattr(showcase, part)()
    shown = images(html)
    assert len({alt for alt, _ in shown}) == len(shown) == count
    for alt, image in shown:
        assert sum(number > 0 for number in image.convert("L").histogram()) > 20, f"{alt} is empty"
    assert len(html) < 120_000


def test_images_of_the_package_are_small() -> None:
    files = [*showcase.IMAGES.iterdir()]
    assert {file.suffix for file in files} == {".webp"}
    assert sum(file.stat().st_size for file in files) < 300_000


def test_pairs_before_and_after(tmp_path: Path) -> None:
    """A pair needs both images; names from the record never leave the folder of the samples."""
    job = create_job(tmp_path, "train", "toy", [])
    samples = job.run / "samples"
    samples.mkdir(parents=True)
    for name, color in (("00.png", "red"), ("base-00.png", "blue"), ("01.png", "red")):
        Image.new("RGB", (600, 600), color).save(samples / name)
    Image.new("RGB", (8, 8)).save(job.run / "secret.png")
    prompts = {"samples/00.png": "a <toy>", "samples/01.png": "no base image", "../secret.png": "outside"}
    write_json(job.run / "result.json", {"samples": [{"file": f, "prompt": p} for f, p in prompts.items()] + ["junk"]})
    html = comparison_html(job)
    (before, blue), (after, red) = images(html)
    assert (before, after) == ("Base model: a &lt;toy&gt;", "With the adapter: a &lt;toy&gt;")
    assert blue.size == (384, 384)
    assert blue.convert("RGB").getpixel((0, 0))[2] > 200 > red.convert("RGB").getpixel((0, 0))[2]
    assert "no base image" not in html
    (job.run / "result.json").unlink()
    assert comparison_html(job) == ""
