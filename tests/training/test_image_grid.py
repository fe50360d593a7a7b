"""Image grids: every image and label is at its position."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.raising import raises
from tests.training.images import gradient
from veneer.injection.errors import VeneerError
from veneer.training.report.image_grid import GRAY, INK, GridRow, before_after, fit_in_cell, make_grid
from veneer.training.report.label_fonts import label_font, printable
from veneer.training.report.png_metadata import save_png
from veneer.training.report.previews import PreviewPair

CELL = 96


def color(*rgb, size=(64, 64)):
    return Image.new("RGB", size, rgb)


def stamp(words, size, ink, font=None):
    """The text in the label font, cropped to its pixels."""
    font = font or label_font(size)
    image = Image.new("RGB", (int(font.getlength(words)) + 8, 2 * size), "white")
    ImageDraw.Draw(image).text((0, 0), words, ink, font)
    found = np.argwhere(np.asarray(image).min(-1) < 255)
    (top, left), (bottom, right) = found.min(0), found.max(0) + 1
    return np.asarray(image)[top:bottom, left:right]


def places(page, part):
    """(x, y) of every exact occurrence of `part` on the page."""
    page = np.asarray(page).astype(int)
    part = np.asarray(part).astype(int)
    high, wide = part.shape[:2]
    if page.shape[0] < high or page.shape[1] < wide:
        return []
    anchor = np.unravel_index(part.sum(-1).argmin(), part.shape[:2])  # the darkest pixel: few candidates
    rows, columns = np.nonzero((page == part[anchor]).all(-1))
    found = []
    for y, x in zip(rows - anchor[0], columns - anchor[1], strict=True):
        inside = 0 <= y <= page.shape[0] - high and 0 <= x <= page.shape[1] - wide
        if inside and np.array_equal(page[y : y + high, x : x + wide], part):
            found.append((int(x), int(y)))
    return found


def place(page, part):
    found = places(page, part)
    assert len(found) == 1, found
    return found[0]


PHOTOS = [gradient(64, 64, i) for i in range(3)]
BASE = [gradient(64, 64, 10 + i) for i in range(4)]
ADAPTED = [gradient(64, 64, 20 + i) for i in range(4)]
PROMPTS = ["a photo of <toy>", "<toy> on the beach"]
PAIRS = [PreviewPair(PROMPTS[i // 2], i % 2, BASE[i], ADAPTED[i]) for i in range(4)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Written as a PNG and opened again."""
    path = tmp_path_factory.mktemp("sheet") / "before_after.png"
    made = before_after(
        PHOTOS, PAIRS, title="duck", note="200 steps of lora", footer="similarity  0.8  0.5\nclip features", cell=CELL
    )
    save_png(made, path, {"kind": "sheet"})
    with Image.open(path) as image:
        image.load()
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", made.size)
    return image


def test_every_image_is_there_once_enlarged_to_its_place(page):
    spots = [place(page, fit_in_cell(image, CELL)) for image in (*PHOTOS, *BASE, *ADAPTED)]
    assert len(set(spots)) == 11
    assert max(x for x, _ in spots) + CELL <= page.width
    assert max(y for _, y in spots) + CELL <= page.height


def test_photos_on_top_then_a_row_for_each_prompt_with_the_base_on_the_left(page):
    photos, base, adapted = ([place(page, fit_in_cell(p, CELL)) for p in group] for group in (PHOTOS, BASE, ADAPTED))
    assert len({y for _, y in photos}) == 1
    for row in (0, 2):
        assert len({y for _, y in base[row : row + 2] + adapted[row : row + 2]}) == 1
        assert [x for x, _ in base[row : row + 2] + adapted[row : row + 2]] == [x for x, _ in base[:2] + adapted[:2]]
    assert photos[0][1] < base[0][1] < base[2][1]
    assert base[0][0] < base[1][0] < adapted[0][0] < adapted[1][0]
    assert adapted[0][0] - base[1][0] > base[1][0] - base[0][0], "the groups are set apart"


def test_no_two_images_overlap(page):
    spots = [place(page, fit_in_cell(p, CELL)) for p in (*PHOTOS, *BASE, *ADAPTED)]
    for i, (x, y) in enumerate(spots):
        for u, v in spots[i + 1 :]:
            assert abs(x - u) >= CELL or abs(y - v) >= CELL


def test_labels_are_above_their_images(page):
    title = place(page, stamp("duck", 24, INK))
    note = place(page, stamp("200 steps of lora", 14, GRAY))
    heads = place(page, stamp("base", 18, INK)), place(page, stamp("with the adapter", 18, INK))
    prompts = [place(page, stamp(prompt, 16, INK)) for prompt in PROMPTS]
    photos, base, adapted = (place(page, fit_in_cell(group[0], CELL)) for group in (PHOTOS, BASE, ADAPTED))
    second = place(page, fit_in_cell(BASE[2], CELL))
    assert title[1] < note[1] < place(page, stamp("photos", 16, INK))[1] < photos[1] < heads[0][1]
    assert heads[0][1] < prompts[0][1] < base[1]
    assert base[1] + CELL <= prompts[1][1] < second[1]
    assert abs(heads[0][0] - base[0]) <= 2
    assert abs(heads[1][0] - adapted[0]) <= 2
    footer = [place(page, stamp(word, 14, GRAY)) for word in ("similarity", "0.8", "0.5")]
    assert second[1] + CELL <= min(y for _, y in footer)
    assert footer[0][0] < footer[1][0] < footer[2][0]


def test_narrow_rows_stand_beside_one_another():
    """Three rows, two across: the third below, each with its label above its images, and a row with other groups separate."""
    images = [gradient(64, 64, 30 + i) for i in range(5)]
    words = ["one two three four five six", "short", "third"]
    rows = [GridRow("all", (tuple(images[3:]),)), *(GridRow(w, ((p,),)) for w, p in zip(words, images, strict=False))]
    page = make_grid(rows, cell=CELL, across=2)
    first, second, third, *apart = (place(page, fit_in_cell(image, CELL)) for image in images)
    assert apart[0][1] == apart[1][1] < first[1] == second[1] < third[1]
    assert first[0] + CELL < second[0]
    assert first[0] == third[0]
    for word, spot in (("short", second), ("third", third)):
        label = place(page, stamp(word, 16, INK))
        assert abs(label[0] - spot[0]) <= 2
        assert label[1] < spot[1]
    parts = [place(page, stamp(part, 16, INK)) for part in ("one two", "three four")]
    assert parts[0][1] < parts[1][1] < first[1], "a label is wrapped at its own images' width"


def test_images_of_one_seed_are_two_prompts_across():
    pairs = [PreviewPair(f"prompt {i}", 0, BASE[i], ADAPTED[i]) for i in range(4)]
    page = before_after([], pairs, cell=CELL)
    spots = [(place(page, fit_in_cell(p.base, CELL)), place(page, fit_in_cell(p.adapted, CELL))) for p in pairs]
    assert [b[1] for b, _ in spots] == [a[1] for _, a in spots]
    assert spots[0][0][1] == spots[1][0][1] < spots[2][0][1] == spots[3][0][1]
    assert spots[0][0][0] < spots[0][1][0] < spots[1][0][0] < spots[1][1][0]
    heads = places(page, stamp("base", 18, INK))
    assert len(heads) == 2
    assert all(abs(x - spot[0][0]) <= 2 for (x, _), spot in zip(sorted(heads), spots[:2], strict=True))


def test_images_keep_their_aspect_and_none_leaves_its_place_empty():
    wide, tall = color(200, 30, 30, size=(80, 40)), color(30, 30, 200, size=(20, 40))
    assert fit_in_cell(wide, CELL).size == (96, 48)
    assert fit_in_cell(tall, CELL).size == (48, 96)
    made = np.asarray(make_grid([GridRow("", ((wide, None, tall),))], cell=CELL))
    red, blue = ((made == c).all(-1) for c in ((200, 30, 30), (30, 30, 200)))
    assert (red.sum(), blue.sum()) == (96 * 48, 48 * 96)
    gap = np.nonzero(blue.any(0))[0].min() - np.nonzero(red.any(0))[0].max()
    assert gap > CELL, "an empty place of one cell lies between"


def test_many_photos_are_counted_and_only_some_are_shown():
    photos = [gradient(32, 32, i) for i in range(8)]
    page = before_after(photos, PAIRS[:1], cell=CELL, shown=6)
    place(page, stamp("photos (6 of 8)", 16, INK))
    assert [len(places(page, fit_in_cell(p, CELL))) for p in photos] == [1] * 6 + [0] * 2


def test_a_sheet_without_photos_has_the_pairs_alone():
    page = before_after([], PAIRS[:1], cell=CELL)
    assert not places(page, stamp("photos", 16, INK))
    place(page, fit_in_cell(BASE[0], CELL))


def test_long_labels_are_wrapped_within_the_page():
    page = make_grid([GridRow("a very long prompt about <toy> " * 4, ((color(0, 200, 0),),))], title="Title " * 12, cell=CELL)
    ink = np.nonzero((np.asarray(page) != 255).any(-1).any(0))[0]
    assert ink.min() >= 20
    assert ink.max() < page.width - 8
    unbroken = make_grid([GridRow("x" * 90, ((color(0, 200, 0),),))], cell=CELL)
    assert np.nonzero((np.asarray(unbroken) != 255).any(-1).any(0))[0].max() < unbroken.width - 8


@pytest.mark.parametrize("words", ["Пёс на пляже", "Ένας σκύλος", "łódź, một con chó", "3 × 2 → 6 – “ø” €"])
def test_labels_have_latin_greek_and_cyrillic_letters(words):
    made = make_grid([GridRow(words, ((color(0, 200, 0),),))], cell=CELL)
    place(made, stamp(words, 16, INK))
    font = label_font(16)
    lacking = bytes(font.getmask("\uffff"))
    assert [c for c in words if not c.isspace() and bytes(font.getmask(c)) == lacking] == []


def test_without_a_cjk_font_a_label_names_the_package_to_install(monkeypatch, caplog):
    monkeypatch.setattr("veneer.training.report.label_fonts.CJK_FONTS", ())
    printable.cache_clear()
    made = make_grid([GridRow("one 犬 の写真", ((color(0, 200, 0),),))], cell=CELL)
    place(made, stamp("one [install Noto Sans CJK]", 16, INK))
    assert "fonts-noto-cjk" in caplog.text
    printable.cache_clear()


def test_a_label_is_written_in_an_installed_font_that_has_its_characters(monkeypatch):
    """As with CJK; here with a font of matplotlib and a letter missing in DejaVu Sans."""
    folder = Path(pytest.importorskip("matplotlib", reason="needs matplotlib").get_data_path())
    file, letter = str(folder / "fonts" / "ttf" / "STIXGeneral.ttf"), "\u1d81"
    monkeypatch.setattr("veneer.training.report.label_fonts.CJK_FONTS", (file,))
    printable.cache_clear()
    made = make_grid([GridRow(letter, ((color(0, 200, 0),),))], cell=CELL)
    place(made, stamp(letter, 16, INK, label_font(16, file)))
    printable.cache_clear()


def test_other_characters_without_a_glyph_are_named():
    made = make_grid([GridRow("🦆 duck", ((color(0, 200, 0),),))], cell=3 * CELL)
    place(made, stamp("[duck] duck", 16, INK))


def test_a_small_sheet_is_wide_enough_for_its_heads():
    page = before_after([], PAIRS[:1], cell=48)
    assert page.width >= 300
    assert places(page, stamp("base", 18, INK))


def test_nothing_to_show_is_refused():
    for rows in ([], [GridRow("a", ((None,),))]):
        with raises(VeneerError, where="rows", given=0):
            make_grid(rows)
