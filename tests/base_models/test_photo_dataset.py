"""Real photos: selection, crops and cutouts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.images import DATA
from veneer.base_models.pretraining.data import photo_dataset
from veneer.base_models.pretraining.data.photo_dataset import CLOTHES, STORED, SUBJECTS, VALIDATION, Photograph

TEST = {"backpack", "can", "dog7", "dog8"}


def ramp(height: int, width: int) -> np.ndarray:
    red, green = np.mgrid[0:height, 0:width]
    return np.stack([red, green, np.zeros_like(red)], -1).astype(np.uint8)


def lay_out(folder: Path) -> Path:
    """A folder of photos in the expected layout: two of each class and split, and of every subject."""
    places = [folder / "clothing-160" / split / name for split in ("train", "validation", "test") for name in CLOTHES]
    places += [folder / "subjects-more" / name for name in (*SUBJECTS, *VALIDATION, *TEST)]
    for number, place in enumerate(places):
        place.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40 + i, 50), (number, i, 0)).save(place / f"{i}.png")
    return folder


def test_training_photos_and_instances(tmp_path: Path) -> None:
    photos = photo_dataset.load(lay_out(tmp_path))
    assert len(photos) == 2 * len(CLOTHES) + 2 * len(SUBJECTS)
    splits = {int(photo.pixels[0, 0, 0]) for photo in photos}
    assert splits == {*range(len(CLOTHES)), *range(3 * len(CLOTHES), 3 * len(CLOTHES) + len(SUBJECTS))}
    clothes, subjects = photos[: 2 * len(CLOTHES)], photos[2 * len(CLOTHES) :]
    assert not any(photo.subject for photo in clothes)
    assert len({photo.instance for photo in clothes}) == len(clothes)
    assert all(photo.subject for photo in subjects)
    assert [a.instance for a in subjects[::2]] == [b.instance for b in subjects[1::2]]
    assert len({photo.instance for photo in photos}) == len(clothes) + len(SUBJECTS)
    assert [photo.word for photo in subjects[::2]] == list(SUBJECTS.values())


def test_subject_splits_are_disjoint() -> None:
    assert not SUBJECTS.keys() & VALIDATION.keys()
    assert not TEST & {*SUBJECTS, *VALIDATION}


@pytest.mark.parametrize("size", [(400, 300), (300, 500)])
def test_photos_are_downscaled(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGBA", size, (10, 20, 30, 255)).save(tmp_path / "a.png")
    pixels = photo_dataset.read(tmp_path / "a.png")
    assert min(pixels.shape[:2]) == STORED
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(size[0] / size[1], abs=0.01)
    assert pixels.shape[2] == 3


def test_center_square_and_random_crops() -> None:
    pixels = ramp(100, 160)
    middle = photo_dataset.square(pixels, 50)
    assert middle.shape == (50, 50, 3)
    assert middle[..., 1].min() >= 29
    assert middle[..., 1].max() <= 131
    assert abs(int(middle[25, 25, 1]) - 80) <= 2
    crops = [photo_dataset.crop(np.random.default_rng(i), pixels, 50) for i in range(40)]
    assert {crop.shape for crop in crops} == {(50, 50, 3)}
    directions = [np.sign(int(crop[25, 40, 1]) - int(crop[25, 10, 1])) for crop in crops]
    assert 8 < directions.count(-1) < 32  # mirrored
    widths = [int(crop[..., 1].max()) - int(crop[..., 1].min()) for crop in crops]
    assert 74 <= min(widths) < 85 < max(widths) <= 102
    assert min(int(crop[..., 1].min()) for crop in crops) < 15
    assert max(int(crop[..., 1].max()) for crop in crops) > 145


@pytest.fixture
def cutouts():
    pytest.importorskip("cv2", reason="photos are cut with OpenCV, of the extra `base`")
    from veneer.base_models.pretraining.data import cutouts

    return cutouts


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A red ellipse on a green background, with noise, and its mask."""
    rows, columns = np.mgrid[0:120, 0:160]
    inside = ((rows - 55) / 30) ** 2 + ((columns - 90) / 40) ** 2 < 1
    pixels = np.where(inside[..., None], (200, 40, 30), (60, 150, 70)) + np.random.default_rng(seed).normal(0, 6, (120, 160, 3))
    return pixels.clip(0, 255).astype(np.uint8), inside


def test_cutout_on_a_uniform_background(cutouts) -> None:
    pixels, inside = scene()
    found = cutouts.mask(pixels)
    assert found is not None
    assert (found & inside).sum() / (found | inside).sum() > 0.95
    icon = cutouts.icon(pixels, found)
    assert icon.shape == (128, 128, 4)
    opaque = icon[icon[..., 3] > 250][:, :3].astype(int)
    np.testing.assert_allclose(opaque.mean(0), (200, 40, 30), atol=6)
    rows, columns = np.flatnonzero((icon[..., 3] > 128).any(1)), np.flatnonzero((icon[..., 3] > 128).any(0))
    assert (columns[0], columns[-1]) == (0, 127)  # the longer side fills the square
    assert abs(rows[0] - (127 - rows[-1])) <= 2  # and the shorter is centered


def test_no_cutout_of_uniform_photos_or_two_things(cutouts) -> None:
    assert cutouts.mask(np.full((80, 80, 3), 120, np.uint8)) is None
    pixels, _ = scene()
    both = np.concatenate([pixels, pixels], 1)
    assert cutouts.mask(both) is None


def test_cutouts_are_cached_with_their_photos(cutouts, tmp_path: Path) -> None:
    flat = np.full((80, 80, 3), 120, np.uint8)
    photos = [Photograph(pixels, "ball", i) for i, pixels in enumerate([flat, scene(0)[0], scene(1)[0]])]
    rgba, which = cutouts.load(photos, [0, 1, 2], tmp_path / "cut.npz")
    assert which == [1, 2]
    again, same = cutouts.load([], [], tmp_path / "cut.npz")
    np.testing.assert_array_equal(rgba, again)
    assert same == which


@pytest.mark.skipif(not (DATA / "clothing-160").is_dir(), reason="../shared/data is not there")
def test_counts_of_real_photos() -> None:
    assert len(photo_dataset.clothes(DATA, "validation")) == 341
    subjects = photo_dataset.subjects(DATA, VALIDATION)
    assert {photo.instance for photo in subjects} == set(range(len(VALIDATION)))
    assert len(subjects) == 22
