"""The example images match their captions, and photos have their license."""

import json

import numpy as np
from PIL import Image

from tests.raising import raises
from veneer import base_models
from veneer.base_models.pretraining import scene_judge
from veneer.base_models.pretraining.data import example_images, photo_dataset
from veneer.base_models.pretraining.data.icon_sets import Icons
from veneer.base_models.pretraining.data.scenes import Compositor
from veneer.training.data.photo_folder import find_photos


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))


def test_example_captions_match_the_images() -> None:
    lines = [json.loads(line) for line in (base_models.examples() / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == len(list(base_models.examples().glob("*.png"))) == 5
    for line in lines:
        seen = scene_judge.measure(pixels(base_models.examples() / line["file_name"]))
        assert "{concept}" in line["text"]
        size = "" if seen.size == "large" else f"{seen.size} "
        assert line["text"] == f"a {size}{{concept}}, {seen.place}, {seen.background} background"


def test_examples_have_different_backgrounds() -> None:
    images = [scene_judge.measure(pixels(file)) for file in sorted(base_models.examples().glob("*.png"))]
    assert len({image.background for image in images}) == 5


def test_examples_are_composed_scenes(tmp_path) -> None:
    rgba = np.zeros((1, 128, 128, 4), np.uint8)
    rgba[0, np.hypot(*np.mgrid[-63.5:64, -63.5:64]) < 64] = (128, 66, 170, 255)
    example_images.write(Icons(rgba, [example_images.WORD], [example_images.SET]), tmp_path)
    for number, scene in enumerate(example_images.SCENES, 1):
        (plain,) = Compositor(rgba)([scene])
        difference = np.abs(pixels(tmp_path / f"{number:02}.png").astype(int) - plain)
        assert difference.max() <= 2


def test_sneaker_photos_have_their_license() -> None:
    folder = base_models.examples("sneaker")
    photos = find_photos(folder, resolution=base_models.preset("bundled").resolution)
    assert len(photos) == 6
    assert {photo.size for photo in photos} == {(192, 192)}
    license = (folder / "LICENSE.md").read_text()
    for part in ("`shiny_sneaker`", "Nataniel Ruiz", "https://creativecommons.org/licenses/by/4.0/", "resized"):
        assert part in license
    assert "shiny_sneaker" in photo_dataset.VALIDATION, "held out from training"


def test_unknown_example_error() -> None:
    with raises(base_models.BaseModelError, where="examples", given="boot", expected=base_models.EXAMPLES):
        base_models.examples("boot")
