"""Mutations of a file's bytes, and of its path."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from tests.formats.malformed.draft import mutation


@mutation("bytes")
def cut_short(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice([0, rng.randrange(len(data)), rng.randrange(len(data)), len(data) - 1])]


@mutation("bytes")
def lengthened(data: bytes, rng: Random) -> bytes:
    return data + rng.randbytes(rng.choice([1, 4, 8, 1000]))


@mutation("bytes")
def flipped_bits(data: bytes, rng: Random) -> bytes:
    """Anywhere, or in the header."""
    found, most = bytearray(data), rng.choice([len(data), min(len(data), 8 + int.from_bytes(data[:4], "little") % len(data))])
    for _ in range(rng.choice([1, 1, 2, 10])):
        found[rng.randrange(most)] ^= 1 << rng.randrange(8)
    return bytes(found)


@mutation("bytes")
def other_bytes(data: bytes, rng: Random) -> bytes:
    """Replace a few bytes, some by zeros."""
    start, length = rng.randrange(len(data)), rng.randrange(1, 64)
    return data[:start] + rng.choice([bytes(length), rng.randbytes(length)]) + data[start + rng.choice([length, length - 1]) :]


@mutation("bytes")
def a_piece_twice(data: bytes, rng: Random) -> bytes:
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:stop] + data[start:stop] + data[stop:]


@mutation("bytes")
def of_something_else(data: bytes, rng: Random) -> bytes:
    """A pickle, an archive, an image, a web page, a pointer of Git LFS, noise."""
    starts = [b"PK\x03\x04", b"GGUF", b"\x80" + bytes([rng.randrange(2, 6)]), b"\x89PNG\r\n\x1a\n", b"RIFF\x10\x00\x00\x00WEBP"]
    texts = [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\noid", b"[]", b"\xff\xfe\x00", b"{}"]
    start = rng.choice(starts)
    return rng.choice([start + data, start + data[len(start) :], rng.choice(texts), rng.randbytes(len(data))])


@mutation("path")
def something_in_its_place(path: Path, data: bytes, rng: Random) -> Path:
    """A pipe, a folder, a link in a circle or to nowhere or to a device; there, or in a folder of that name."""
    path.unlink()
    where = path
    if rng.random() < 0.4:
        path.mkdir()
        where = path / rng.choice(["adapter.safetensors", "adapter_model.safetensors", "x.safetensors"])
    kind = rng.choice(["pipe", "folder", "circle", "nowhere", "device", "gone"])
    if kind == "pipe":
        os.mkfifo(where)
    elif kind == "folder":
        where.mkdir()
    elif kind != "gone":
        where.symlink_to({"circle": where, "nowhere": path.parent / "nowhere", "device": Path("/dev/zero")}[kind])
    return path


@mutation("path")
def a_path_that_is_none(path: Path, data: bytes, rng: Random) -> Path:
    names = [path / "x", Path(f"{path}\0"), path.with_name("x" * 5000), path.with_name("\ud800"), path / "a" / ".."]
    return rng.choice([*names, path.parent / "..", Path(path.anchor)])


@mutation("path", loads=True)
def another_name_for_it(path: Path, data: bytes, rng: Random) -> Path:
    """Without its suffix, or by a longer way."""
    return rng.choice([path.with_suffix("") if path.suffix == ".safetensors" else path, path.parent / "." / path.name])
