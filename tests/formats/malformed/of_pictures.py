"""Mutations of an image with a token embedding."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from random import Random
from typing import Any

from tests.formats.malformed.draft import mutation


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ROWS: list[Any] = [
    [], [[]], [[1.0]], 5, None, "x", [[1, "2"]], [[1], [1, 2]], [[None] * 8], [[True] * 8], [[10**400] * 8], [[1e39] * 8],
    [[math.nan] * 8], [[math.inf] * 8], [[0.5] * 8], [0.5] * 8, [[0.5] * 7], [[[0.5] * 8]], {"TORCHTENSOR": []},
    [[0.5] * 8] * 3000, [[-0.0] * 8], [[1] * 8],
]  # fmt: skip


@mutation("picture")
def another_word(data: bytes, rng: Random) -> bytes:
    """A text that is not a token embedding, is too long, or decompresses to too much."""
    rows = rng.choice(ROWS)
    name: Any = rng.choice(["cat", "", None, 5, [], "a b", "x" * 10**5, "\ud800", "É"])
    word: Any = {"string_to_param": {"*": {"TORCHTENSOR": rows}}, "name": name}
    others = [[], 5, {}, {"string_to_param": 5}, {"string_to_param": {}}, {"clip_g": {"TORCHTENSOR": rows}}, {"clip_l": rows}]
    said = json.dumps(rng.choice([word] * 6 + others)).encode()
    text = base64.b64encode(rng.choice([said] * 8 + [b"[" * 10**6, b"[" + b"{}," * 10**6 + b"{}]"]))
    text = rng.choice([text] * 4 + [text[:-1], b"!" + text, b"", b"x" * 10**6])
    packed = rng.choice([zlib.compress(text), zlib.compress(bytes(2 * 10**8)), zlib.compress(text)[:-3], b"\x00"])
    made = rng.choice([chunk(b"tEXt", b"sd-ti-embedding\0" + text)] * 3 + [chunk(b"zTXt", b"sd-ti-embedding\0\0" + packed)])
    return data[:33] + made + rng.choice([b"", data[33:]])


@mutation("picture")
def another_picture(data: bytes, rng: Random) -> bytes:
    """Claimed sizes, wrong chunks, no token embedding at all."""
    claimed = [(2**31 - 1, 2**31 - 1), (60000, 60000), (20000, 9000), (9000, 9000), (0, 0), (1, 2**31 - 1), (8, 8), (4000, 2000)]
    size = struct.pack(">II", *rng.choice(claimed)) + rng.choice([b"\x08\x02\0\0\0", b"\x10\x06\0\0\0", b"\x01\x00\0\0\0"])
    pixels = rng.choice([zlib.compress(bytes(200)), zlib.compress(bytes(10**8), 9), b"", b"x"])
    length = struct.pack(">I", rng.choice([2**31, 2**32 - 1, 10**6])) + b"tEXtsd-ti-embedding\0"
    start = data[:8] + chunk(b"IHDR", size)
    claimed_too = rng.choice([b"\xff\xff\xff\xff\xff\x3f", b"\x07\0\0\x07\0\0"])
    webp = b"RIFF\xff\xff\xff\x7fWEBPVP8X\n\0\0\0\0\0\0\0" + claimed_too + rng.randbytes(40)
    return rng.choice([start + chunk(b"IDAT", pixels) + chunk(b"IEND", b""), start + length, start, webp])
