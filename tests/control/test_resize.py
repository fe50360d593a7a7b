"""Resized maps: colors, thin lines and areas are preserved."""

import numpy as np
import pytest
from PIL import Image

from tests.control.images import disc, drawing, scene, white
from veneer.control.map_agreement import overlap
from veneer.control.maps.resize import resize_map

CLASSES = np.random.default_rng(0).integers(0, 255, (20, 3), np.uint8)


def held(image):
    return {tuple(each) for each in np.asarray(image).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("size", [(24, 18), (64, 48), (7, 5)])
def test_few_colors_take_the_nearest_pixel(size):
    given = Image.fromarray(CLASSES[np.random.default_rng(1).integers(0, 20, (30, 40))])
    made = np.asarray(resize_map(given, size))
    assert held(Image.fromarray(made)) <= held(given)
    values = np.asarray(given)
    for y in range(size[1]):
        for x in range(size[0]):
            assert (made[y, x] == values[int((y + 0.5) * 30 / size[1]), int((x + 0.5) * 40 / size[0])]).all()


def test_many_colors_are_smooth():
    assert resize_map(scene(128), (64, 64)).tobytes() == scene(128).resize((64, 64), Image.Resampling.BICUBIC).tobytes()
    assert resize_map(scene(64), (64, 64)).tobytes() == scene(64).tobytes()


@pytest.mark.parametrize("scale", [2, 3, 8])
@pytest.mark.parametrize("inverted", [False, True])
def test_thin_lines_survive_wherever_they_lie(scale, inverted):
    side = 24 * scale
    for offset in range(scale):
        lines = np.zeros((side, side), bool)
        lines[:, 5 * scale + offset] = lines[12 * scale + offset] = True
        lines[range(side), range(side)] = True
        made = white(resize_map(drawing(lines ^ inverted), (24, 24))) ^ inverted
        wanted = np.zeros((24, 24), bool)
        wanted[:, 5] = wanted[12] = wanted[range(24), range(24)] = True
        assert (made == wanted).all()


def test_areas_do_not_grow():
    given = drawing(white(disc(512, (0, 0, 0), (255, 255, 255))))
    assert 0.6 < white(given).mean() < 0.8
    assert overlap(resize_map(given, (64, 64)), drawing(white(given.resize((64, 64), Image.Resampling.BOX)))) > 0.97
    assert white(resize_map(given, (64, 64))).mean() == pytest.approx(white(given).mean(), rel=0.01)
