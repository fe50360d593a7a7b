"""Every picture is opened before training; each bad one here is a file really written that way."""

import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.raising import raises
from tests.training.pictures import DATA, gradient, save
from veneer.classification.data.image_checks import check_pictures
from veneer.classification.data.labeled_images import hash_of
from veneer.classification.data.sources import find_pictures
from veneer.training.data.image_io import DataError

CLOTHING = DATA / "clothing-160"


def classes(root, names=("cat", "dog"), each=3):
    for seed, name in enumerate(names):
        for number in range(each):
            save(root / name / f"{number}.png", 20, 16, seed=10 * seed + number)
    return root


def bomb(path):
    """A PNG whose header claims 30,000 x 30,000 pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_good_pictures_are_all_kept(tmp_path):
    source = find_pictures(classes(tmp_path))
    checked = check_pictures(source)
    assert checked.source == source
    assert checked.notes == ()
    assert checked.source.hashes == {e.name: hash_of((tmp_path / e.name).read_bytes()) for e in source.examples}


def test_bad_pictures_are_named_and_left_out(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat" / "empty.png").touch()
    whole = save(tmp_path / "cat" / "cut.jpg").read_bytes()
    (tmp_path / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "text.jpg").write_text("hello, I am none")
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    bomb(tmp_path / "dog" / "bomb.png")
    (tmp_path / "dog" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    source, notes = check_pictures(find_pictures(tmp_path), folder=tmp_path / "run")
    assert {each.name for each in source.examples} == {f"{c}/{n}.png" for c in ("cat", "dog") for n in range(3)}
    (told,) = notes
    assert told.startswith(f"{tmp_path}: 6 of 12 pictures cannot be used; left out:")
    for name, reason in [
        ("cat/empty.png", "empty"),
        ("cat/cut.jpg", "damaged"),
        ("cat/text.jpg", "hello, I am none"),
        ("dog/gone.png", "broken link"),
        ("dog/bomb.png", "900,000,000 pixels"),
        ("dog/phone.heic", "HEIC"),
    ]:
        assert [line for line in told.splitlines() if name in line and reason in line], name
    assert (tmp_path / "run" / "skipped.txt").read_text().splitlines() == [line.strip() for line in told.splitlines()[1:]]


def test_many_lines_are_summed_up(tmp_path):
    classes(tmp_path)
    for number in range(49):
        (tmp_path / "cat" / f"bad{number:02d}.png").touch()
    source = find_pictures(tmp_path)
    (told,) = check_pictures(source, folder=tmp_path / "run").notes
    assert told.splitlines()[-1] == f"  and 37 more; all in {tmp_path / 'run' / 'skipped.txt'}"
    assert len(told.splitlines()) == 14
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 49
    assert check_pictures(source).notes[0].endswith("  and 37 more")


def test_strict(tmp_path):
    classes(tmp_path)
    check_pictures(find_pictures(tmp_path), strict=True)
    (tmp_path / "cat" / "empty.png").touch()
    with raises(DataError, file=tmp_path, where="pictures", given=("cat/empty.png",)):
        check_pictures(find_pictures(tmp_path), strict=True)


def test_unusual_pictures_are_read_rightly(tmp_path):
    classes(tmp_path)
    whole, folder = gradient(40, 24), tmp_path / "cat"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise makes it upright
    whole.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    whole.quantize(256).save(folder / "palette.png")
    whole.convert("CMYK").save(folder / "print.tif")
    alpha = whole.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.repeat([0, 255], 20).astype(np.uint8), (24, 1))))
    alpha.save(folder / "alpha.png")
    deep = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (24, 1))
    Image.fromarray(deep).save(folder / "deep.png")
    source, notes = check_pictures(find_pictures(tmp_path))
    assert notes == ()
    read = {e.name[4:]: np.asarray(source.read(e), int) for e in source.examples if e.name.startswith("cat/")}
    expected = np.asarray(whole, int)
    assert np.array_equal(read["turned.png"], expected)
    assert np.abs(read["palette.png"] - expected).mean() < 8
    assert np.abs(read["print.tif"] - expected).mean() < 3
    assert (read["alpha.png"][:, :20] == 255).all()
    assert np.array_equal(read["alpha.png"][:, 20:], expected[:, 20:])
    assert np.abs(read["deep.png"] - deep[..., None] / 257).max() <= 1


def test_what_was_done_to_pictures_is_told(tmp_path):
    classes(tmp_path)
    frames = [gradient(20, 16, seed=n) for n in range(3)]
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / "dog" / name, save_all=True, append_images=frames[1:])
    (told,) = check_pictures(find_pictures(tmp_path)).notes
    assert "2 used all the same: holds several frames or pages; only the first is used: dog/a.gif, dog/b.gif" in told


def damaged_exif(path):
    """A TIFF with a tag that promises more bytes than there are: Pillow reads it and warns."""
    save(path, 20, 16)
    data = bytearray(path.read_bytes())
    at = struct.unpack_from("<I", data, 4)[0]
    last = at + 2 + 12 * (struct.unpack_from("<H", data, at)[0] - 1)
    struct.pack_into("<HHII", data, last, 0xC000, 2, 1000, len(data) + 50)
    path.write_bytes(bytes(data))


def test_pillows_warnings_become_notes_and_the_filters_stay(tmp_path):
    classes(tmp_path)
    for number in range(40):
        damaged_exif(tmp_path / "cat" / f"odd{number:02d}.tif")
    before, shown = list(warnings.filters), warnings.showwarning
    source, notes = check_pictures(find_pictures(tmp_path), threads=8)
    assert len(source) == 46
    assert [note for note in notes if "40 used all the same" in note and "cat/odd00.tif" in note]
    assert list(warnings.filters) == before
    assert warnings.showwarning is shown


def test_a_class_without_readable_pictures_is_an_error(tmp_path):
    classes(tmp_path)
    (tmp_path / "fish").mkdir()
    (tmp_path / "fish" / "a.png").touch()
    with raises(DataError, file=tmp_path, where="unreadable", given=("fish",)):
        check_pictures(find_pictures(tmp_path))


def test_one_class_is_an_error(tmp_path):
    classes(tmp_path / "pets", ("cat", "dog"))
    with raises(DataError, file=tmp_path, where="classes", given=("pets",), expected=2):
        check_pictures(find_pictures(tmp_path))


def test_a_class_for_the_test_only_is_left_out(tmp_path):
    classes(tmp_path / "train")
    classes(tmp_path / "test", ("bird", "cat", "dog"), each=2)
    found = find_pictures(tmp_path)
    assert found.classes == ("bird", "cat", "dog")
    source, notes = check_pictures(found)
    assert source.classes == ("cat", "dog")
    assert {(e.name.split("/")[1], source.classes[e.label]) for e in source.examples} == {("cat", "cat"), ("dog", "dog")}
    assert "test/bird/0.png: bird has no picture for training" in notes[0]
    assert notes[1] == f"{tmp_path}: bird: pictures for validation or test only; left out."
    with raises(DataError, where="pictures", given=("test/bird/0.png", "test/bird/1.png")):
        check_pictures(found, strict=True)


def test_classes_that_are_not_tested_are_named(tmp_path):
    classes(tmp_path / "train", ("bird", "cat", "dog"))
    classes(tmp_path / "test")
    assert check_pictures(find_pictures(tmp_path)).notes == (
        f"{tmp_path}: no picture for testing in bird; accuracy says nothing of them.",
    )


def test_a_class_of_one_picture_is_named(tmp_path):
    classes(tmp_path)
    save(tmp_path / "bird" / "a.png")
    source, notes = check_pictures(find_pictures(tmp_path))
    assert "bird" in source.classes
    assert notes == (f"{tmp_path}: one picture only for training in bird; it trains, so the class is not tested. Add pictures.",)


def test_what_was_found_before_is_told_as_well(tmp_path):
    classes(tmp_path)
    (tmp_path / "fish").mkdir()
    assert check_pictures(find_pictures(tmp_path)).notes == (f"{tmp_path}: no pictures in fish; left out.",)


def test_progress_is_told_in_order_and_in_this_thread(tmp_path):
    told = []
    check_pictures(find_pictures(classes(tmp_path)), progress=lambda *now: told.append((*now, threading.current_thread())))
    assert told == [(done, 6, threading.main_thread()) for done in range(1, 7)]


def test_a_picture_that_changes_later_is_noticed(tmp_path):
    source, _ = check_pictures(find_pictures(classes(tmp_path)))
    save(tmp_path / "cat" / "0.png", 20, 16, seed=99)
    with raises(DataError, file="cat/0.png", given="changed"):
        source.read(source.examples[0])


def test_any_number_of_threads_finds_the_same(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat" / "empty.png").touch()
    found = find_pictures(tmp_path)
    assert check_pictures(found, threads=1) == check_pictures(found, threads=7)


@pytest.mark.skipif(not CLOTHING.is_dir(), reason="../shared/data/clothing-160 is not there")
def test_some_of_the_clothing_photos():
    found = find_pictures(CLOTHING).keeping(lambda each: each.split == "test")
    source, notes = check_pictures(find_pictures(CLOTHING).keeping(lambda each: each.name.endswith(("0.jpg", "1.jpg"))))
    assert len(found) == 372
    assert len(source.hashes) == len(source) > 300
    assert notes == ()
