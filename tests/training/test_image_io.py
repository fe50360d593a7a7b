"""Safe reading of images: every case is a file written in that format."""

import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.raising import raises, warns
from tests.training.images import DATA, gradient, save
from veneer.injection.errors import VeneerError
from veneer.training.data.image_io import (
    FIRST_FRAME,
    FORMATS,
    PROFILE_UNUSED,
    DataWarning,
    PhotoError,
    PhotoLimits,
    decode,
    read_mask,
    read_photo,
)

SUFFIXES = ["png", "jpg", "webp", "bmp", "tif", "gif"]


def close(image: Image.Image, other: Image.Image, tolerance: float) -> bool:
    return image.size == other.size and np.abs(np.asarray(image, float) - np.asarray(other, float)).mean() < tolerance


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_listed_format_is_read(tmp_path, suffix):
    photo = read_photo(save(tmp_path / f"a.{suffix}"))
    assert photo.mode == "RGB"
    assert close(photo, gradient(80, 64), 8)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    whole = tmp_path / f"whole.{suffix}"
    noise.save(whole)
    data = whole.read_bytes()
    part = tmp_path / f"part.{suffix}"
    part.write_bytes(data[: max(12, int(len(data) * share))])
    with raises(PhotoError, file=part) as caught:
        read_photo(part)
    assert caught.value.given.startswith("damaged")


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    """Damage anywhere gives an image or a PhotoError, nothing else."""
    draws = np.random.default_rng(1)
    for suffix in SUFFIXES:
        data = bytearray(save(tmp_path / f"a.{suffix}", 40, 40).read_bytes())
        for _ in range(60):
            broken = bytearray(data)
            for place in draws.integers(0, len(data), 4):
                broken[place] = draws.integers(0, 256)
            with suppress(PhotoError):
                assert decode(bytes(broken), "a").rgb.mode == "RGB"


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with raises(PhotoError, file=path, given="empty", expected=FORMATS):
        read_photo(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"hello, I am no image", "text"),
        ("überall Text".encode(), "text"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(40), "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(40), "video"),
        (b"8BPS\0\1" + bytes(40), "PSD"),
        (b"%PDF-1.7\n", "PDF"),
        (bytes(range(200, 256)), "unknown"),
        (bytes(100), "unknown"),
    ],
)
def test_files_that_are_not_images_are_identified(tmp_path, content, kind):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with raises(PhotoError, file=path, given=kind, expected=FORMATS):
        read_photo(path)


def test_a_format_outside_the_list_is_not_even_tried(tmp_path):
    """Pillow supports ICO, PPM and more; unneeded decoders are not exposed to untrusted files."""
    gradient(32, 32).save(tmp_path / "a.ppm")
    (tmp_path / "a.ppm").rename(tmp_path / "a.png")
    with raises(PhotoError, given="unknown", expected=FORMATS):
        read_photo(tmp_path / "a.png")


def test_the_suffix_does_not_matter(tmp_path):
    save(tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png").size == (80, 64)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_keeps_its_colors(tmp_path, suffix):
    flat = Image.new("RGB", (64, 48), (200, 40, 90))
    flat.convert("CMYK").save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as stored:
        assert stored.mode == "CMYK"
    photo = read_photo(tmp_path / f"a.{suffix}")
    assert photo.mode == "RGB"
    assert np.abs(np.asarray(photo, float) - np.asarray(flat, float)).max() < 6


def test_a_color_profile_is_applied(tmp_path):
    """A file whose profile swaps nothing but states linear light must come out brighter in sRGB."""
    linear = _linear_profile()
    Image.new("RGB", (32, 32), (55, 55, 55)).save(tmp_path / "a.png", icc_profile=linear)
    assert 120 < np.asarray(read_photo(tmp_path / "a.png")).mean() < 136  # sRGB of 55/255 linear light is 128
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (32, 32), (55, 55, 55)).save(tmp_path / "b.png", icc_profile=srgb)
    assert np.asarray(read_photo(tmp_path / "b.png")).mean() == 55


def test_an_invalid_color_profile_is_ignored_with_a_warning(tmp_path):
    save(tmp_path / "a.png", icc_profile=b"no profile at all")
    with warns(DataWarning, file=tmp_path / "a.png", given=PROFILE_UNUSED):
        assert close(read_photo(tmp_path / "a.png"), gradient(80, 64), 1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    photo = np.asarray(read_photo(tmp_path / f"a.{suffix}"))
    assert np.abs(photo[0, :, 0].astype(float) - ramp[0] / 257).max() <= 0.51
    assert photo[0, 32, 0] < 140, "clipped to white"


def test_16_bit_color_is_scaled(tmp_path):
    values = np.zeros((32, 32, 3), dtype=">u2")
    values[..., 0], values[..., 1] = 65535, 0x4000
    (tmp_path / "a.png").write_bytes(_png(32, 32, values.tobytes(), depth=16))
    assert tuple(np.asarray(read_photo(tmp_path / "a.png"))[5, 5]) == (255, 64, 0)


def test_values_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((32, 32), 10**6, np.int32)).save(tmp_path / "b.tif")
    for name, mode in (("a", "F"), ("b", "I")):
        with raises(PhotoError, file=tmp_path / f"{name}.tif", where="mode", given=mode):
            read_photo(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation_is_used_with_a_warning(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with warns(DataWarning, file=tmp_path / f"a.{suffix}", given=FIRST_FRAME):
        photo = read_photo(tmp_path / f"a.{suffix}")
    assert np.abs(np.asarray(photo, float).mean((0, 1)) - (255, 0, 0)).max() < 8


def test_a_phone_image_with_a_preview_inside_is_no_animation(tmp_path):
    gradient(64, 64).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[gradient(32, 32)])
    assert read_photo(tmp_path / "a.jpg").size == (64, 64)  # a warning would be an error here


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    """Stored so that a viewer that obeys the tag shows the gradient upright."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the tag's own turn undoes
    upright = gradient(96, 64)
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert close(read_photo(tmp_path / "a.jpg"), upright, 6)


def test_a_bomb_is_refused_by_its_header_alone(tmp_path):
    """Only the header is there: a decoder that started would complain about missing data instead."""
    sizes = {(30_000, 4_000): "max_side", (30_000, 20): "max_side", (60_000, 60_000): "max_pixels", (9_000, 9_000): "max_pixels"}
    for (width, height), limit in sizes.items():
        (tmp_path / "a.png").write_bytes(_png(width, height, b"", whole=False))
        with raises(PhotoError, file=tmp_path / "a.png", where=limit):
            read_photo(tmp_path / "a.png")


def test_an_image_above_max_side_is_an_error_with_its_size(tmp_path):
    Image.new("L", (30_000, 400)).save(tmp_path / "wide.png")
    with raises(PhotoError, file=tmp_path / "wide.png", where="max_side", given=(30_000, 400), expected=20_000):
        read_photo(tmp_path / "wide.png")
    assert read_photo(tmp_path / "wide.png", PhotoLimits(max_side=30_000, max_aspect=75)).size == (30_000, 400)


@pytest.mark.parametrize(
    ("limit", "value"),
    [("max_bytes", 100), ("max_pixels", 80 * 64 - 1), ("max_side", 79), ("min_side", 65), ("max_aspect", 1.2)],
)
def test_each_limit(tmp_path, limit, value):
    path = save(tmp_path / "a.png")
    with raises(PhotoError, file=path, where=limit, given=None if limit == "max_bytes" else (80, 64), expected=value):
        read_photo(path, PhotoLimits(**{limit: value}))
    assert read_photo(path, PhotoLimits(max_pixels=80 * 64, max_side=80, min_side=64, max_aspect=1.25)).size == (80, 64)


def _cut_out(mode: str) -> Image.Image:
    """Left half opaque red, right half transparent blue."""
    image = Image.new("RGBA", (40, 32), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (20, 0, 40, 32))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "gif"), ("RGBA", "webp"), ("RGBA", "tif")]
)
def test_transparent_parts_lie_on_the_stated_color_and_make_a_mask(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    _cut_out(mode).save(path, **({"lossless": True} if suffix == "webp" else {}))
    white, green = (np.asarray(read_photo(path, limits)) for limits in (PhotoLimits(), PhotoLimits(background=(0, 255, 0))))
    assert tuple(white[16, 30]) == (255, 255, 255)
    assert tuple(green[16, 30]) == (0, 255, 0)
    assert np.array_equal(white[:, :18], green[:, :18])
    mask = np.asarray(read_mask(path))
    assert mask[16, 5] == 255
    assert mask[16, 30] == 0


def test_a_transparent_palette_entry(tmp_path):
    image = Image.new("P", (32, 32), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (16, 0, 32, 32))
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    photo = np.asarray(read_photo(tmp_path / "a.png"))
    assert (tuple(photo[0, 0]), tuple(photo[0, 31])) == ((255, 0, 0), (255, 255, 255))


def test_an_opaque_alpha_channel_is_no_mask(tmp_path):
    gradient(32, 32).convert("RGBA").save(tmp_path / "a.png")
    assert decode((tmp_path / "a.png").read_bytes(), "a").alpha is None


def test_nothing_to_see_or_to_keep_is_refused(tmp_path):
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    with raises(PhotoError, given="transparent"):
        read_photo(tmp_path / "clear.png")
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
    with raises(PhotoError, given="black"):
        read_mask(tmp_path / "black.png")


def test_paths_that_are_not_regular_files(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name, found in (("none.png", "missing"), ("folder.png", "not a regular file"), ("link.png", "broken link")):
        with raises(PhotoError, file=tmp_path / name, given=found):
            read_photo(tmp_path / name)


def test_errors_are_of_both_families():
    assert issubclass(PhotoError, VeneerError)
    assert issubclass(PhotoError, ValueError)


def test_nothing_is_left_open_or_behind(tmp_path):
    """An unclosed file would be a ResourceWarning and so an error; and the folder is unchanged."""
    path = save(tmp_path / "a.jpg")
    read_photo(path)
    path.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not DATA.is_dir(), reason="the measurement data is not on this machine")
def test_real_photos():
    paths = sorted((DATA / "subjects").rglob("*.jpg"))
    assert len(paths) >= 14
    assert all(max(read_photo(path).size) == 512 for path in paths)


def _png(width: int, height: int, raw: bytes, depth: int = 8, whole: bool = True) -> bytes:
    """A PNG written by hand: RGB of any depth, or only a header that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = width * 3 * depth // 8
    rows = b"".join(b"\0" + raw[i : i + row] for i in range(0, len(raw), row))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + (chunk(b"IEND", b"") if whole else b"")


def _linear_profile() -> bytes:
    """sRGB's primaries with a straight curve: the standard profile with its three curves replaced by gamma 1."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    for entry in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * entry)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sIHHi", profile, offset, b"para", 0, 0, 0, 1 << 16)
        if name == b"desc":
            at = profile.find("sRGB".encode("utf-16-be"), offset)
            profile[at : at + 8] = "flat".encode("utf-16-be")

    return bytes(profile)
