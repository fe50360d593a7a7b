"""Image checks on real valid, unusual and damaged files."""

import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.raising import raises
from tests.training.images import DATA, gradient, save
from veneer.classification.data.image_checks import check_images
from veneer.classification.data.labeled_images import hash_of
from veneer.classification.data.sources import open_source
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


def test_valid_images_are_kept(tmp_path):
    source = open_source(classes(tmp_path))
    checked = check_images(source)
    assert checked.source == source
    assert checked.notes == ()
    assert checked.source.hashes == {e.name: hash_of((tmp_path / e.name).read_bytes()) for e in source.examples}


def test_unreadable_images_are_skipped_and_listed(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat" / "empty.png").touch()
    whole = save(tmp_path / "cat" / "cut.jpg").read_bytes()
    (tmp_path / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "text.jpg").write_text("hello, I am none")
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    bomb(tmp_path / "dog" / "bomb.png")
    (tmp_path / "dog" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    source, notes = check_images(open_source(tmp_path), folder=tmp_path / "run")
    assert {each.name for each in source.examples} == {f"{c}/{n}.png" for c in ("cat", "dog") for n in range(3)}
    (note,) = notes
    assert note.startswith(f"{tmp_path}: 6 of 12 images cannot be used and are skipped:")
    for name, reason in [
        ("cat/empty.png", "empty"),
        ("cat/cut.jpg", "damaged"),
        ("cat/text.jpg", "hello, I am none"),
        ("dog/gone.png", "broken link"),
        ("dog/bomb.png", "900,000,000 pixels"),
        ("dog/phone.heic", "HEIC"),
    ]:
        assert [line for line in note.splitlines() if name in line and reason in line], name
    assert (tmp_path / "run" / "skipped.txt").read_text().splitlines() == [line.strip() for line in note.splitlines()[1:]]


def test_long_listings_are_truncated(tmp_path):
    classes(tmp_path)
    for number in range(49):
        (tmp_path / "cat" / f"bad{number:02d}.png").touch()
    source = open_source(tmp_path)
    (note,) = check_images(source, folder=tmp_path / "run").notes
    assert note.splitlines()[-1] == f"  and 37 more; all in {tmp_path / 'run' / 'skipped.txt'}"
    assert len(note.splitlines()) == 14
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 49
    assert check_images(source).notes[0].endswith("  and 37 more")


def test_strict(tmp_path):
    classes(tmp_path)
    check_images(open_source(tmp_path), strict=True)
    (tmp_path / "cat" / "empty.png").touch()
    with raises(DataError, file=tmp_path, where="pictures", given=("cat/empty.png",)):
        check_images(open_source(tmp_path), strict=True)


def test_orientation_palette_cmyk_alpha_and_16_bit(tmp_path):
    classes(tmp_path)
    whole, folder = gradient(40, 24), tmp_path / "cat"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise for display
    whole.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    whole.quantize(256).save(folder / "palette.png")
    whole.convert("CMYK").save(folder / "print.tif")
    alpha = whole.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.repeat([0, 255], 20).astype(np.uint8), (24, 1))))
    alpha.save(folder / "alpha.png")
    deep = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (24, 1))
    Image.fromarray(deep).save(folder / "deep.png")
    source, notes = check_images(open_source(tmp_path))
    assert notes == ()
    read = {e.name[4:]: np.asarray(source.read(e), int) for e in source.examples if e.name.startswith("cat/")}
    expected = np.asarray(whole, int)
    assert np.array_equal(read["turned.png"], expected)
    assert np.abs(read["palette.png"] - expected).mean() < 8
    assert np.abs(read["print.tif"] - expected).mean() < 3
    assert (read["alpha.png"][:, :20] == 255).all()
    assert np.array_equal(read["alpha.png"][:, 20:], expected[:, 20:])
    assert np.abs(read["deep.png"] - deep[..., None] / 257).max() <= 1


def test_remarks_are_grouped(tmp_path):
    classes(tmp_path)
    frames = [gradient(20, 16, seed=n) for n in range(3)]
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / "dog" / name, save_all=True, append_images=frames[1:])
    (note,) = check_images(open_source(tmp_path)).notes
    assert "dog/a.gif, dog/b.gif" in note
    assert "frames" in note


def damaged_exif(path):
    """A TIFF with a tag that claims more bytes than the file has: Pillow reads it with a warning."""
    save(path, 20, 16)
    data = bytearray(path.read_bytes())
    at = struct.unpack_from("<I", data, 4)[0]
    last = at + 2 + 12 * (struct.unpack_from("<H", data, at)[0] - 1)
    struct.pack_into("<HHII", data, last, 0xC000, 2, 1000, len(data) + 50)
    path.write_bytes(bytes(data))


def test_pillow_warnings_become_notes(tmp_path):
    classes(tmp_path)
    for number in range(40):
        damaged_exif(tmp_path / "cat" / f"odd{number:02d}.tif")
    before, shown = list(warnings.filters), warnings.showwarning
    source, notes = check_images(open_source(tmp_path), threads=8)
    assert len(source) == 46
    assert [note for note in notes if "40 images used with a remark" in note and "cat/odd00.tif" in note]
    assert list(warnings.filters) == before
    assert warnings.showwarning is shown


def test_class_without_readable_images_is_an_error(tmp_path):
    classes(tmp_path)
    (tmp_path / "fish").mkdir()
    (tmp_path / "fish" / "a.png").touch()
    with raises(DataError, file=tmp_path, where="unreadable", given=("fish",)):
        check_images(open_source(tmp_path))


def test_single_class_is_an_error(tmp_path):
    classes(tmp_path / "pets", ("cat", "dog"))
    with raises(DataError, file=tmp_path, where="classes", given=("pets",), expected=2):
        check_images(open_source(tmp_path))


def test_class_in_test_only_is_skipped(tmp_path):
    classes(tmp_path / "train")
    classes(tmp_path / "test", ("bird", "cat", "dog"), each=2)
    found = open_source(tmp_path)
    assert found.classes == ("bird", "cat", "dog")
    source, notes = check_images(found)
    assert source.classes == ("cat", "dog")
    assert {(e.name.split("/")[1], source.classes[e.label]) for e in source.examples} == {("cat", "cat"), ("dog", "dog")}
    assert "test/bird/0.png: bird has no training image" in notes[0]
    assert notes[1] == f"{tmp_path}: bird: images in validation or test only; class skipped."
    with raises(DataError, where="pictures", given=("test/bird/0.png", "test/bird/1.png")):
        check_images(found, strict=True)


def test_classes_without_test_images_are_noted(tmp_path):
    classes(tmp_path / "train", ("bird", "cat", "dog"))
    classes(tmp_path / "test")
    assert check_images(open_source(tmp_path)).notes == (
        f"{tmp_path}: no test image in bird; the test accuracy does not cover these classes.",
    )


def test_class_with_one_image_is_noted(tmp_path):
    classes(tmp_path)
    save(tmp_path / "bird" / "a.png")
    source, notes = check_images(open_source(tmp_path))
    assert "bird" in source.classes
    assert notes == (f"{tmp_path}: only one training image in bird; the class is therefore not tested. Add images.",)


def test_notes_of_the_source_are_kept(tmp_path):
    classes(tmp_path)
    (tmp_path / "fish").mkdir()
    assert check_images(open_source(tmp_path)).notes == (f"{tmp_path}: no images in fish; skipped.",)


def test_progress_is_called_in_order_in_the_main_thread(tmp_path):
    calls = []
    check_images(open_source(classes(tmp_path)), progress=lambda *now: calls.append((*now, threading.current_thread())))
    assert calls == [(done, 6, threading.main_thread()) for done in range(1, 7)]


def test_image_that_changes_after_the_check_is_an_error(tmp_path):
    source, _ = check_images(open_source(classes(tmp_path)))
    save(tmp_path / "cat" / "0.png", 20, 16, seed=99)
    with raises(DataError, file="cat/0.png", given="changed"):
        source.read(source.examples[0])


def test_result_is_independent_of_thread_count(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat" / "empty.png").touch()
    found = open_source(tmp_path)
    assert check_images(found, threads=1) == check_images(found, threads=7)


@pytest.mark.skipif(not CLOTHING.is_dir(), reason="../shared/data/clothing-160 is not there")
def test_clothing_photos():
    found = open_source(CLOTHING).filter(lambda each: each.split == "test")
    source, notes = check_images(open_source(CLOTHING).filter(lambda each: each.name.endswith(("0.jpg", "1.jpg"))))
    assert len(found) == 372
    assert len(source.hashes) == len(source) > 300
    assert notes == ()
