"""Photos and maps as files, with all mistakes that folders have."""

import warnings

import numpy as np
import pytest
from PIL import Image

from tests.control.images import drawing
from tests.raising import carries, raises
from tests.training.images import gradient, save
from veneer.control.image_pairs import FOLDERS, find_pairs
from veneer.training.data.image_io import DataError


def folders(root, names=("a", "b", "c"), maps="conditions", photo=".png", given=".png"):
    for seed, name in enumerate(names):
        save(root / "images" / f"{name}{photo}", seed=seed)
        save(root / maps / f"{name}{given}", seed=seed + 50)
    return root


def beside(root, names=("a", "b"), ending=".map.png"):
    for seed, name in enumerate(names):
        save(root / f"{name}.jpg", seed=seed)
        save(root / f"{name}{ending}", seed=seed + 50)
    return root


def names(found):
    return [(pair.photo.path.name, pair.map.path.name) for pair in found.pairs]


@pytest.mark.parametrize("maps", FOLDERS)
def test_two_folders(tmp_path, maps):
    found = find_pairs(folders(tmp_path, maps=maps))
    assert names(found) == [(f"{n}.png", f"{n}.png") for n in "abc"]
    assert found.notes == ()
    assert {pair.map.path.parent.name for pair in found.pairs} == {maps}


@pytest.mark.parametrize("given", [".webp", ".jpg", ".png"])
def test_suffixes_may_differ(tmp_path, given):
    found = find_pairs(folders(tmp_path, photo=".jpg", given=given))
    assert names(found) == [(f"{n}.jpg", f"{n}{given}") for n in "abc"]


@pytest.mark.parametrize("ending", [".map.png", "_map.png", ".map.webp"])
def test_one_folder(tmp_path, ending):
    found = find_pairs(beside(tmp_path, ("a", "b.c", "road_map_of"), ending))
    assert names(found) == [(f"{n}.jpg", f"{n}{ending}") for n in ("a", "b.c", "road_map_of")]
    assert found.notes == ()


def test_captions_and_masks_are_the_photos(tmp_path):
    root = folders(tmp_path)
    (root / "images" / "a.txt").write_text("a red house")
    Image.new("L", (80, 64), 255).save(root / "images" / "b.mask.png")
    a, b, c = find_pairs(root).pairs
    assert (a.photo.caption, b.photo.caption) == ("a red house", None)
    assert (b.photo.mask, c.photo.mask) == (root / "images" / "b.mask.png", None)
    assert beside(tmp_path / "other")
    (tmp_path / "other" / "b.txt").write_text("a blue one")
    assert [pair.photo.caption for pair in find_pairs(tmp_path / "other").pairs] == [None, "a blue one"]


@pytest.mark.parametrize("layout", [folders, beside])
def test_files_without_a_partner_are_listed(tmp_path, layout):
    root = layout(tmp_path, ("a", "lost", "b", "gone"))
    suffix = ".png" if layout is folders else ".jpg"
    photos, maps = (root / "images", root / "conditions") if layout is folders else (root, root)
    (photos / f"lost{suffix}").unlink()
    (maps / ("gone.png" if layout is folders else "gone.map.png")).unlink()
    found = find_pairs(root)
    assert [pair.photo.path.stem for pair in found.pairs] == ["a", "b"]
    lost = "lost.png" if layout is folders else "lost.map.png"
    wanted = (f"{root}: photos without a map: gone{suffix}; skipped.", f"{root}: maps without a photo: {lost}; skipped.")
    assert found.notes == wanted
    with raises(DataError, file=root, where="pairs", given=wanted, expected=2):
        find_pairs(root, strict=True)


def test_unreadable_files_and_their_partners_are_listed(tmp_path):
    root = folders(tmp_path, ("a", "b", "c", "d"))
    (root / "images" / "b.png").write_text("no image")
    (root / "conditions" / "c.png").write_bytes(b"")
    found = find_pairs(root)
    assert [pair.photo.path.stem for pair in found.pairs] == ["a", "d"]
    told = "\n".join(found.notes)
    for text in (
        "b.png: text ('no image')",
        "c.png: the file is empty",
        "photos without a map: c.png",
        "without a photo: b.png",
    ):
        assert text in told
    with raises(DataError, file=root / "images") as caught:
        find_pairs(root, strict=True)
    carries(*caught.value.given, file=root / "images" / "b.png", given="text")


def test_aspect_ratios_must_agree_to_a_percent(tmp_path):
    root = folders(tmp_path, ("a",))
    for name, width in (("near", 1008), ("far", 1012), ("turned", 500)):
        save(root / "images" / f"{name}.png", 1000, 500, seed=width)
        save(root / "conditions" / f"{name}.png", width, 500 if name != "turned" else 1000)
    save(root / "images" / "small.png", 512, 341)
    save(root / "conditions" / "small.png", 32, 21)  # rounded
    found = find_pairs(root)
    assert [pair.photo.path.stem for pair in found.pairs] == ["a", "near", "small"]
    turned = f"{root / 'conditions' / 'turned.png'}: a map of 500 x 1000 for a photo of 1000 x 500"
    assert [note.split(";")[0] for note in found.notes] == [
        turned.replace("turned", "far").replace("500 x 1000", "1012 x 500"),
        turned,
    ]


def test_a_turned_phone_photo_fits_its_upright_map(tmp_path):
    root = folders(tmp_path, ("a",))
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(80, 64).save(root / "images" / "phone.jpg", exif=exif)
    save(root / "conditions" / "phone.png", 64, 80)
    (_, phone), notes = find_pairs(root)
    assert notes == ()
    assert [each.size for each in phone.read()] == [(64, 80), (64, 80)]


def test_maps_are_read_at_the_size_of_the_photo(tmp_path):
    root = folders(tmp_path, ("smooth", "lines"))
    save(root / "conditions" / "smooth.png", 160, 128)
    lines = np.zeros((128, 160), bool)
    lines[:, 33] = True
    drawing(lines).convert("1").save(root / "conditions" / "lines.png")
    lines, smooth = (pair.read() for pair in find_pairs(root).pairs)
    assert smooth[0].tobytes() == gradient(80, 64, 0).tobytes()
    assert smooth[1].tobytes() == gradient(160, 128).resize((80, 64), Image.Resampling.BICUBIC).tobytes()
    assert (np.asarray(lines[1])[..., 0] == np.where(np.arange(80) == 16, 255, 0)).all()


def test_a_changed_file_is_an_error(tmp_path):
    root = folders(tmp_path)
    pair = find_pairs(root).pairs[0]
    pair.read()
    save(root / "conditions" / "a.png", seed=9)
    with raises(DataError, file=root / "conditions" / "a.png", given="changed"):
        pair.read()


def test_notes_list_copied_photos_and_transparent_maps_but_not_copied_maps(tmp_path):
    root = folders(tmp_path, ("a", "b", "c"))
    for name in ("a", "b"):
        save(root / "conditions" / f"{name}.png", seed=1)
    for name in ("b", "c"):
        save(root / "images" / f"{name}.png", seed=2)
    clear = gradient(80, 64).convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(root / "conditions" / "c.png")
    found = find_pairs(root)
    assert len(found.pairs) == 3
    told, twice = found.notes
    assert "transparent parts, which are composited on (255, 255, 255): c.png" in told
    assert twice.startswith("2 copies of one image: b.png, c.png.")


def test_folders_that_are_no_pairs(tmp_path):
    with raises(DataError, file=tmp_path / "nowhere", given="missing"):
        find_pairs(tmp_path / "nowhere")
    save(tmp_path / "one" / "images" / "a.png")
    with raises(DataError, file=tmp_path / "one", where="maps", given=(), expected=FOLDERS):
        find_pairs(tmp_path / "one")
    folders(tmp_path / "two")
    folders(tmp_path / "two", maps="maps")
    with raises(DataError, file=tmp_path / "two", where="maps", given=("conditions", "maps")):
        find_pairs(tmp_path / "two")
    save(tmp_path / "three" / "a.png")
    save(tmp_path / "three" / "control" / "a.png")
    with raises(DataError, file=tmp_path / "three", where="images", given="control"):
        find_pairs(tmp_path / "three")
    save(tmp_path / "four" / "a.png")
    save(tmp_path / "four" / "treasure_map.png")
    with raises(DataError, file=tmp_path / "four", where="pairs", expected=0) as caught:
        find_pairs(tmp_path / "four")
    assert all(name in note for name, note in zip(("a.png", "treasure_map.png"), caught.value.given, strict=True))


def test_two_files_of_one_name_are_an_error(tmp_path):
    root = folders(tmp_path / "folders")
    save(root / "images" / "a.jpg")
    with raises(DataError, file=root, where="photos", given=("a.jpg", "a.png")):
        find_pairs(root)
    root = beside(tmp_path / "beside")
    save(root / "b_map.png")
    with raises(DataError, file=root, where="maps", given=("b.map.png", "b_map.png")):
        find_pairs(root)


def test_other_warnings_pass_through(tmp_path, monkeypatch):
    import veneer.control.image_pairs as module

    def noisy(*arguments, **options):
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
        return found(*arguments, **options)

    found = module.find_photos
    monkeypatch.setattr(module, "find_photos", noisy)
    with pytest.warns(RuntimeWarning, match="something else"):
        assert find_pairs(folders(tmp_path)).notes == ()
