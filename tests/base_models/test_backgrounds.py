"""Scenes with background photos (surroundings), and reading of the photos."""

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from veneer.base_models.pretraining.data import backgrounds
from veneer.base_models.pretraining.data.scenes import COLORS, SIDE, Compositor, Scene, sample_scenes, surround

SHARE = 0.3
RAMP = Image.fromarray(np.add.outer(np.zeros(100), np.arange(200)).astype(np.uint8)).convert("RGB")
LARGE = RAMP.resize((400, 200))


def test_scene_background_is_the_seeded_crop() -> None:
    compositor = Compositor(np.zeros((1, 128, 128, 4), np.uint8), {"park": LARGE})
    first, same, other = compositor([Scene(0, "small", "center", "park", crop) for crop in (5, 5, 6)])
    np.testing.assert_array_equal(first, backgrounds.crop(LARGE, 5, SIDE))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.parametrize("seed", range(20))
def test_crop_is_a_square_of_the_given_size(seed: int) -> None:
    part = np.asarray(backgrounds.crop(RAMP, seed, 64)).astype(int)[..., 0]
    assert part.shape == (64, 64)
    steps = np.diff(part[0])
    assert (part == part[0]).all()
    assert (np.abs(steps - steps.mean()) <= 1).all()  # the ramp is straight, so nothing was stretched or repeated
    assert 0.9 <= abs(steps.mean()) <= 100 / 64 + 0.1


def test_crop_sizes_vary() -> None:
    steps = [np.abs(np.diff(np.asarray(backgrounds.crop(RAMP, seed, 64))[0, :, 0].astype(int)).mean()) for seed in range(60)]
    assert min(steps) < 1.1
    assert max(steps) > 1.4  # 100 / 64 is the whole height


def test_surround_changes_the_background_of_a_fraction() -> None:
    scenes = sample_scenes(np.random.default_rng(0), [1, 2], 2000)
    moved = surround(np.random.default_rng(1), scenes, SHARE)
    pairs = list(zip(scenes, moved, strict=True))
    changed = [(a, b) for a, b in pairs if a != b]
    assert abs(len(changed) / len(pairs) - SHARE) < 3 * (SHARE * (1 - SHARE) / len(pairs)) ** 0.5
    assert {b.background for _, b in changed} == set(backgrounds.WORDS)
    assert all((a.icon, a.size, a.place) == (b.icon, b.size, b.place) for a, b in pairs)
    assert not set(backgrounds.WORDS) & set(COLORS)


def test_radiance_map_is_tone_mapped_to_mid_gray(tmp_path: Path) -> None:
    openexr = pytest.importorskip("OpenEXR", reason="panoramas are read with OpenEXR, of the extra `base`")
    light = np.full((8, 16, 3), 0.5, np.float16)
    light[:2] = np.inf
    light[2, 0] = np.nan
    light[3, 0] = 0
    light[6, 8] = (-0.1, 0.5, 0.5)  # the compression rings below zero beside strong lights
    light[6, 9] = (0, 0.5, 0.5)
    openexr.File({"compression": openexr.ZIP_COMPRESSION}, {"RGB": light}).write(str(tmp_path / "map.exr"))
    encoded = base64.b64encode((tmp_path / "map.exr").read_bytes()).decode()
    module = tmp_path / "map.exr.js"
    module.write_text(f'export default "data:application/octet-stream;base64,{encoded}"\n')
    photo = np.asarray(backgrounds._panorama(module))
    gray = 255 * (0.35 / 1.35) ** (1 / 2.2)
    assert photo.shape == (8, 16, 3)
    assert np.abs(photo[5:] - gray).max() <= 2
    assert (photo[:3, :1] >= 254).all()
    assert (photo[3, 0] == 0).all()
