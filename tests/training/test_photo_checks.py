"""Checks of photos: real photos have no findings, and copies of them with one defect have that finding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from tests.training.images import DATA
from veneer import base_models
from veneer.training.data.buckets import Size
from veneer.training.data.dataset import PhotoDataset
from veneer.training.data.photo_checks.findings import CHECKS, PhotoFinding, check_photos, dataset_findings
from veneer.training.data.photo_folder import find_photos
from veneer.training.data.photo_source import PhotoSource
from veneer.training.preflight import checks

REAL = sorted(base_models.examples("sneaker").glob("*.jpg"))
SIDE = 128
SUBJECTS = sorted(path for name in ("subjects", "subjects-more") for path in (DATA / name).glob("*") if path.is_dir())


def findings(folder: Path, bucket: Size = (SIDE, SIDE)) -> list[PhotoFinding]:
    return check_photos([(bucket, photo) for photo in find_photos(folder)])


def real(number: int = 0) -> Image.Image:
    with Image.open(REAL[number]) as image:
        return image.convert("RGB")


def save(folder: Path, *images: Image.Image) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", base_models.EXAMPLES)
def test_example_photos_have_no_findings(name: str) -> None:
    assert findings(base_models.examples(name)) == []


@pytest.mark.skipif(not SUBJECTS, reason="needs the photos of ../shared/data")
def test_photos_of_real_subjects_have_no_false_alarms() -> None:
    """The only pair is a photo and its mirror image."""
    every = [each for folder in SUBJECTS for each in findings(folder)]
    assert [(each.check, each.photo.parent.name, each.photo.name, each.other and each.other.name) for each in every] == [
        ("near duplicate", "dog5", "02.jpg", "03.jpg")
    ]


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("blur", lambda image: image.resize((SIDE, SIDE)).filter(ImageFilter.GaussianBlur(2))),
        ("dark", lambda image: ImageEnhance.Brightness(image).enhance(0.25)),
        ("bright", lambda image: Image.blend(image, Image.new("RGB", image.size, "white"), 0.95)),
    ],
)
def test_one_defect_is_one_finding(check: str, change: Callable[[Image.Image], Image.Image], tmp_path: Path) -> None:
    save(tmp_path, real(0), change(real(1)))
    (finding,) = findings(tmp_path)
    assert (finding.check, finding.photo.name, finding.threshold) == (check, "1.png", CHECKS[check].threshold)
    assert CHECKS[check].rejects(finding.value)


def test_blur_is_measured_at_the_training_size_and_at_the_sharpest_part(tmp_path: Path) -> None:
    image = real().resize((256, 256), Image.Resampling.LANCZOS)
    blurred = image.filter(ImageFilter.GaussianBlur(3))
    save(tmp_path, blurred)
    assert [each.check for each in findings(tmp_path, (256, 256))] == ["blur"]
    assert findings(tmp_path, (64, 64)) == []
    blurred.paste(image.crop((64, 64, 192, 192)), (64, 64))
    save(tmp_path, blurred)
    assert findings(tmp_path, (256, 256)) == []


@pytest.mark.parametrize(
    "change",
    [
        ImageOps.mirror,
        lambda image: image.resize((96, 96)),
        lambda image: ImageEnhance.Contrast(image).enhance(1.3),
        lambda image: ImageOps.crop(image, 4),
    ],
)
def test_altered_copies_are_near_duplicates(change: Callable[[Image.Image], Image.Image], tmp_path: Path) -> None:
    save(tmp_path, real(0), real(1), change(real(0)))
    found = [(each.check, each.photo.name, each.other and each.other.name) for each in findings(tmp_path)]
    assert ("near duplicate", "0.png", "2.png") in found
    assert len([each for each in found if each[0] == "near duplicate"]) == 1


def test_wide_photo_on_a_square_crop(tmp_path: Path) -> None:
    save(tmp_path, real(0).resize((384, 192)))
    (finding,) = findings(tmp_path)
    assert (finding.check, finding.value) == ("aspect ratio", 0.5)
    assert findings(tmp_path, (SIDE // 2, SIDE)) == []


def subject(box: tuple[int, int, int, int], folder: Path) -> list[PhotoFinding]:
    """Findings about a photo of 288 x 192 pixels with a mask in a box."""
    save(folder, real(0).resize((288, 192)))
    mask = Image.new("L", (288, 192))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    mask.save(folder / "0.mask.png")
    return findings(folder)


def test_mask_shows_a_subject_that_is_cut_off_or_small(tmp_path: Path) -> None:
    assert subject((96, 48, 191, 143), tmp_path / "fits") == []
    (cut,) = subject((0, 48, 95, 143), tmp_path / "cut")
    assert (cut.check, cut.value) == ("cut off", pytest.approx(0.5, abs=0.02))
    (small,) = subject((140, 90, 159, 109), tmp_path / "small")
    assert (small.check, small.value) == ("small subject", pytest.approx(400 / 192**2, rel=0.1))


def test_findings_are_warnings_with_measured_values(tmp_path: Path) -> None:
    save(tmp_path, ImageEnhance.Brightness(real()).enhance(0.2))
    (finding,) = findings(tmp_path)
    (concern,) = checks.findings([finding])
    assert (concern.about, concern.severity, concern.finding) == ("photos", "warning", finding)
    assert concern.as_dict()["finding"] == {
        "check": "dark", "photo": "0.png", "value": finding.value, "threshold": CHECKS["dark"].threshold
    }  # fmt: skip
    assert "0.png" in str(concern)


def test_photos_of_a_dataset_are_checked_once_and_class_images_are_not(tmp_path: Path) -> None:
    dark = ImageEnhance.Brightness(real()).enhance(0.2)
    photos = find_photos(save(tmp_path / "own", dark))
    others = find_photos(save(tmp_path / "prior", ImageEnhance.Brightness(real(1)).enhance(0.2)), is_prior=True)
    prior = [dataclasses.replace(photo, caption="shoe") for photo in others]
    own = [dataclasses.replace(photo, caption="a shoe") for photo in photos]
    source = PhotoSource(own, (64, SIDE), repeats=3)
    dataset = PhotoDataset.from_sources([source], 8, 0, prior=[PhotoSource(prior, (64,))])
    assert [(each.check, each.photo) for each in dataset_findings(dataset, 8)] == [("dark", tmp_path / "own" / "0.png")]
