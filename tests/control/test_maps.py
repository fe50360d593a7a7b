"""Maps of images whose outline, colors and region are known."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tests.control.images import GREEN, PHOTOS, PURPLE, SKY, disc, distances, drawing, scene, white
from tests.raising import raises
from veneer.control.map_agreement import agreement, overlap
from veneer.control.maps import edges
from veneer.control.maps.edges import canny, gradient, scribble, soft_edge
from veneer.control.maps.foreground import mask
from veneer.control.maps.maps import CONDITIONS, computed, get
from veneer.control.maps.resize import resize_map
from veneer.control.maps.tones import blur, grey, low_resolution, palette
from veneer.injection.errors import OptionError, UnknownName, VeneerError

GROUNDS = [SKY, GREEN, (250, 250, 250), (22, 22, 26), (150, 152, 156)]


def step(height, side=512):
    """Dark on the left, brighter by `height` of Lab's lightness on the right."""
    lightness = np.full((side, side), 0.25)
    lightness[:, side // 2 :] += height
    linear = ((lightness + 0.16) / 1.16) ** 3
    return Image.fromarray((255 * (1.055 * linear ** (1 / 2.4) - 0.055)).round().astype(np.uint8)).convert("RGB")


def test_names_and_descriptions_of_conditions():
    assert computed() == ["canny", "soft_edge", "scribble", "grey", "blur", "palette", "low_resolution", "mask"]
    assert [name for name, each in CONDITIONS.items() if not each.is_computed] == ["pairs", "image"]
    for name, each in CONDITIONS.items():
        assert get(name) is each
        assert each.name == name
        assert (each.measures is None) == (each.function is None)
        assert 10 < len(each.description) < 80


def test_an_unknown_name_suggests_similar_ones():
    with raises(UnknownName, name="softedge", kind="condition", expected=tuple(CONDITIONS)) as caught:
        get("softedge")
    assert caught.value.close[0] == "soft_edge"


@pytest.mark.parametrize("name", ["pairs", "image"])
def test_conditions_with_map_files_are_not_computed(name):
    with raises(OptionError, option="condition", given=name, expected=tuple(computed())):
        get(name)(disc())


@pytest.mark.parametrize("name", computed())
def test_maps_are_rgb_of_the_same_size_the_same_each_time(name):
    for size in [(64, 64), (90, 50), (33, 70), (16, 16), (1, 1), (3, 2)]:
        image = scene(128).resize(size)
        before = image.tobytes()
        made, again = get(name)(image), get(name)(image)
        assert (made.mode, made.size) == ("RGB", size)
        assert made.tobytes() == again.tobytes()
        assert image.tobytes() == before


@pytest.mark.parametrize("name", computed())
def test_every_mode_gives_the_map_of_its_colors(name):
    flat = Image.fromarray(np.where(distances()[..., None] < 20, np.uint8(PURPLE), np.uint8((250, 216, 72))))
    tone = flat.convert("L")
    wide = Image.fromarray(np.asarray(tone).astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    condition = get(name)
    for same, wanted in [
        (flat.convert("RGBA"), flat),
        (flat.quantize(4), flat.quantize(4).convert("RGB")),
        (flat.convert("CMYK"), flat),
        (tone, tone.convert("RGB")),
        (tone.convert("LA"), tone.convert("RGB")),
        (wide, tone.convert("RGB")),
        (Image.fromarray(np.asarray(wide).astype(np.int32)), tone.convert("RGB")),
        (tone.point(lambda v: 255 * (v > 150)).convert("1"), tone.point(lambda v: 255 * (v > 150)).convert("RGB")),
    ]:
        assert condition(same).tobytes() == condition(wanted).tobytes(), same.mode


@pytest.mark.parametrize("name", computed())
def test_transparent_pixels_lie_on_white(name):
    """Whatever color they have; in RGBA and in a palette."""
    inside = distances() < 20
    shown = Image.fromarray(np.where(inside[..., None], np.uint8(PURPLE), np.uint8((255, 255, 255))))
    hidden = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    layer = np.dstack([np.where(inside[..., None], np.uint8(PURPLE), hidden), np.uint8(255 * inside)])
    indexed = Image.fromarray(np.uint8(inside))
    indexed.putpalette([9, 9, 9, *PURPLE])
    indexed.info["transparency"] = 0
    for image in (Image.fromarray(layer), indexed):
        assert get(name)(image).tobytes() == get(name)(shown).tobytes(), image.mode


def test_values_without_a_range_are_refused():
    with raises(VeneerError, where="mode", given="F"):
        canny(Image.new("F", (8, 8)))
    with raises(VeneerError, where="values", given=(0, 70000), expected=(0, 65535)):
        canny(Image.fromarray(np.array([[0, 70000]], np.int32)))


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("side", [64, 200])
def test_canny_of_a_disc_is_a_thin_ring(side, ground):
    lines = white(canny(disc(side, PURPLE, ground)))
    away = np.abs(distances(side) - 0.3 * side)
    assert away[lines].max() < 1.5
    nearest = ndimage.distance_transform_edt(~lines)
    assert nearest[away < 0.5].max() < 2  # closed
    assert lines.sum() < 8 * 0.3 * side  # thin: a circle in steps without diagonals has 8 r


def test_canny_sees_colors_of_one_brightness():
    ground = (62, 168, 82)
    tones = np.asarray(disc(64, PURPLE, ground).convert("L"))
    assert np.ptp(tones) < 3
    assert white(canny(disc(64, PURPLE, ground))).sum() > 100
    assert not white(canny(disc(64, PURPLE, ground).convert("L"))).any()


@pytest.mark.parametrize("sigma", [1.0, 2.5, 6.0])
def test_the_gradient_of_a_step_is_its_height(sigma):
    found = gradient(step(0.4), sigma)
    wanted = 0.4 * np.exp(-0.125 / sigma**2)  # half a pixel from the edge
    assert found.contrast[256, 255:257] == pytest.approx(wanted, rel=0.04)
    assert found.right[256, 256] == pytest.approx(1)
    assert found.down[256, 256] == pytest.approx(0)


def slow_canny(image, sigma, low, high, least):
    """Pixel by pixel from the gradient: ridge, growing from strong pixels, counting each line."""
    contrast, down, right = gradient(image, sigma)
    height, width = contrast.shape

    def at(y, x):
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        below, beside = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = contrast[top, left] * (1 - x + left) + contrast[top, beside] * (x - left)
        lower = contrast[below, left] * (1 - x + left) + contrast[below, beside] * (x - left)
        return upper * (1 - y + top) + lower * (y - top)

    places = [(y, x) for y in range(height) for x in range(width)]
    weak = {
        (y, x)
        for y, x in places
        if contrast[y, x] > low
        and contrast[y, x] >= at(y + down[y, x], x + right[y, x])
        and contrast[y, x] > at(y - down[y, x], x - right[y, x])
    }
    lines = np.zeros((height, width), bool)
    while weak:
        line, waiting = set(), [weak.pop()]
        while waiting:
            y, x = waiting.pop()
            line.add((y, x))
            around = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & weak
            weak -= around
            waiting.extend(around)
        if any(contrast[place] > high for place in line) and len(line) >= least:
            lines[tuple(np.transpose(list(line)))] = True
    return lines


def test_canny_is_the_slow_one():
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(0, 14, (40, 56, 3))
        image = Image.fromarray(np.clip(np.asarray(scene(56))[:40] + noise, 0, 255).astype(np.uint8))
        wanted = slow_canny(image, 0.7, 0.12, 0.22, 0.06 * 40)
        assert wanted.any()
        assert (white(canny(image)) != wanted).mean() < 2e-3  # ties of float32 aside


def test_of_two_equal_pixels_one_is_of_the_line():
    for image in (step(0.4, 64), step(0.4, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        assert (white(canny(image)).sum(1) == 1).all()
        assert (white(canny(image.transpose(Image.Transpose.ROTATE_90))).sum(0) == 1).all()


def test_the_defaults_of_lines_scale_with_the_side(monkeypatch):
    asked = []
    monkeypatch.setattr(edges, "gradient", lambda image, sigma: asked.append(round(sigma, 3)) or gradient(image, 1.0))
    for function in (canny, soft_edge, scribble):
        for side in (64, 500):
            function(disc(side))
    assert asked == [0.7, 2.0, 0.8, 1.6, 2.5, 7.5, 1.2, 5.0]


def test_soft_edge_is_as_bright_as_the_step():
    for height in (0.1, 0.25, 0.4):
        values = np.asarray(soft_edge(step(height)).convert("L")).astype(float)
        assert values[256].max() == pytest.approx(min(1, height / 0.5) * 255, rel=0.03)
        assert abs(int(values[256].argmax()) - 255.5) < 1
        assert values[:, :200].max() == 0


def test_soft_edge_lets_fine_texture_fade():
    """Stripes of 4 pixels at 512 are gone at the coarse smoothing, a step of the same height is not."""
    stripes = Image.fromarray(np.where(np.indices((512, 512))[1] // 2 % 2, 160, 96).astype(np.uint8))
    assert np.asarray(soft_edge(stripes))[100:-100, 100:-100].max() < 0.1 * np.asarray(soft_edge(step(0.25))).max()


@pytest.mark.parametrize("side", [64, 512])
def test_scribble_is_a_thick_ring_and_leaves_small_things_out(side):
    image = disc(side)
    dot = disc(side, (0, 0, 0), radius=0.02, centre=(0.08, 0.08))
    together = Image.fromarray(np.where(distances(side, (0.08, 0.08))[..., None] < 0.05 * side, dot, image))
    lines = white(scribble(together))
    assert white(scribble(together, least=0))[: side // 6, : side // 6].any()
    assert not lines[: side // 6, : side // 6].any()
    pen = max(3, 0.012 * side)
    assert np.abs(distances(side) - 0.3 * side)[lines].max() < pen / 2 + 1.5
    assert lines.sum() == pytest.approx(2 * np.pi * 0.3 * side * pen, rel=0.35)


def test_flat_images_have_no_lines_and_no_object():
    rng = np.random.default_rng(0)
    grainy = Image.fromarray(np.clip(128 + rng.normal(0, 3, (64, 64, 3)), 0, 255).astype(np.uint8))
    for image in (Image.new("RGB", (64, 64), SKY), grainy):
        for function in (canny, scribble, mask):
            assert not white(function(image)).any(), function
    assert not np.asarray(soft_edge(Image.new("RGB", (64, 64), SKY))).any()


def test_grey_is_the_weighted_sum():
    image = scene()
    wanted = np.asarray(image) @ (0.299, 0.587, 0.114)
    made = np.asarray(grey(image)).astype(float)
    assert np.abs(made - wanted[..., None]).max() <= 1


@pytest.mark.parametrize("side", [64, 256])
def test_blur_is_a_gaussian_of_a_part_of_the_side(side):
    image = scene(side)
    sigma = 0.05 * side
    wanted = ndimage.gaussian_filter(np.asarray(image).astype(float), (sigma, sigma, 0), mode="nearest")
    assert np.abs(np.asarray(blur(image)) - wanted).max() < 8
    assert np.abs(np.asarray(blur(image)) - wanted).mean() < 1


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 160)])
def test_the_cells_of_the_palette_have_the_mean(width, height):
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    made = np.asarray(palette(Image.fromarray(values))).astype(float)
    cells = 8
    for top in range(0, height, cells):
        for left in range(0, width, cells):
            cell = np.s_[top : top + cells, left : left + cells]
            assert np.abs(made[cell] - values[cell].mean((0, 1))).max() <= 1.01
    assert len(np.unique(made.reshape(-1, 3), axis=0)) > 0.9 * width * height / cells**2


def test_palette_of_a_large_image_has_as_many_cells():
    made = np.asarray(palette(scene(512)))
    assert (made.reshape(8, 64, 8, 64, 3) == made[::64, ::64].reshape(8, 1, 8, 1, 3)).all()


@pytest.mark.parametrize("side", [64, 480])
def test_low_resolution_equals_a_thumbnail(side):
    checks = Image.fromarray(np.uint8(np.indices((side, side)).sum(0) % 2 * 255))
    assert np.ptp(np.asarray(low_resolution(checks))[side // 8 : -side // 8, side // 8 : -side // 8]) < 16
    small = scene(side).resize((24, 24), Image.Resampling.BICUBIC)
    assert low_resolution(scene(side)).tobytes() == small.resize((side, side), Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize(("radius", "centre"), [(0.3, (0.5, 0.5)), (0.2, (0.3, 0.65)), (0.2, (0.82, 0.5)), (0.46, (0.5, 0.5))])
@pytest.mark.parametrize("side", [64, 160])
def test_mask_of_a_disc_is_the_disc(side, radius, centre, ground):
    wanted = distances(side, centre) < radius * side
    assert overlap(drawing(wanted), mask(disc(side, PURPLE, ground, radius, centre))) > 0.95


def test_mask_fills_holes_and_drops_specks_on_two_colors_of_ground():
    image = np.array(disc(128))
    image[distances(128) < 12] = SKY  # a hole through which the ground is seen
    image[10:12, 10:12] = PURPLE
    image[:, :64] = np.where((image[:, :64] == SKY).all(-1, keepdims=True), np.uint8(GREEN), image[:, :64])
    assert overlap(drawing(distances(128) < 0.3 * 128), mask(Image.fromarray(image))) > 0.95
    assert not white(mask(Image.fromarray(image)))[:20, :20].any()


def test_mask_takes_a_small_thing_on_the_border_for_the_object():
    """A disc cut by the border: its color is on the border, but on a small part of it."""
    image = disc(64, radius=0.15, centre=(0.95, 0.5))
    assert overlap(drawing(distances(64, (0.95, 0.5)) < 0.15 * 64), mask(image)) > 0.9


def reduced(condition, image):
    """Its map, reduced to 64 pixels."""
    made = condition(image)
    return resize_map(made, (64, 64)) if len(made.getcolors(2) or ()) else made.resize((64, 64), Image.Resampling.BOX)


@pytest.mark.parametrize("name", computed())
def test_large_and_small_images_have_like_maps(name):
    assert agreement(name, reduced(get(name), scene(512)), scene(512).resize((64, 64), Image.Resampling.LANCZOS)) > 0.9


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared/data/subjects is not there")
@pytest.mark.parametrize("name", computed())
def test_large_and_small_photos_have_like_maps(name):
    for file in ("dog3/03.jpg", "duck_toy/00.jpg", "monster_toy/04.jpg"):
        with Image.open(PHOTOS / file) as opened:
            photo = opened.convert("RGB")
        small = photo.resize((64, 64), Image.Resampling.LANCZOS)
        assert agreement(name, reduced(get(name), photo), small) > {"canny": 0.6, "scribble": 0.7}.get(name, 0.8), file
