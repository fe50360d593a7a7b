"""Maps at another size: colours stay, thin lines stay, areas stay."""

import numpy as np
import pytest
from PIL import Image

from tests.control.pictures import disc, drawing, scene, white
from veneer.control.map_agreement import overlap
from veneer.control.maps.resize import resized

CLASSES = np.random.default_rng(0).integers(0, 255, (20, 3), np.uint8)


def held(picture):
    return {tuple(each) for each in np.asarray(picture).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("size", [(24, 18), (64, 48), (7, 5)])
def test_few_colours_take_the_nearest_pixel(size):
    given = Image.fromarray(CLASSES[np.random.default_rng(1).integers(0, 20, (30, 40))])
    made = np.asarray(resized(given, size))
    assert held(Image.fromarray(made)) <= held(given)
    values = np.asarray(given)
    for y in range(size[1]):
        for x in range(size[0]):
            assert (made[y, x] == values[int((y + 0.5) * 30 / size[1]), int((x + 0.5) * 40 / size[0])]).all()


def test_many_colours_are_smooth():
    assert resized(scene(128), (64, 64)).tobytes() == scene(128).resize((64, 64), Image.Resampling.BICUBIC).tobytes()
    assert resized(scene(64), (64, 64)).tobytes() == scene(64).tobytes()


@pytest.mark.parametrize("scale", [2, 3, 8])
@pytest.mark.parametrize("inverted", [False, True])
def test_thin_lines_survive_wherever_they_lie(scale, inverted):
    side = 24 * scale
    for offset in range(scale):
        lines = np.zeros((side, side), bool)
        lines[:, 5 * scale + offset] = lines[12 * scale + offset] = True
        lines[range(side), range(side)] = True
        made = white(resized(drawing(lines ^ inverted), (24, 24))) ^ inverted
        wanted = np.zeros((24, 24), bool)
        wanted[:, 5] = wanted[12] = wanted[range(24), range(24)] = True
        assert (made == wanted).all()


def test_areas_do_not_grow():
    given = drawing(white(disc(512, (0, 0, 0), (255, 255, 255))))
    assert 0.6 < white(given).mean() < 0.8
    assert overlap(resized(given, (64, 64)), drawing(white(given.resize((64, 64), Image.Resampling.BOX)))) > 0.97
    assert white(resized(given, (64, 64))).mean() == pytest.approx(white(given).mean(), rel=0.01)
