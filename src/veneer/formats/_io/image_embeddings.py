"""Pictures that hold a learned word, as A1111's web UI makes them: in a text chunk, or in the low bits of their edges."""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.injection import LoadError

from .header import unique

PNG, CHUNK = b"\x89PNG\r\n\x1a\n", "sd-ti-embedding"
LARGEST_FILE, LARGEST_TEXT, LARGEST_PICTURE = 32_000_000, 6_000_000, 8_000_000  # bytes, bytes when unpacked, pixels
LARGEST_WORD = 1_000_000  # numbers
ENCODERS = ("clip_l", "clip_g")
UNNAMED = "emb_params"  # as in sd-scripts' files, which say no token


def is_picture(start: bytes) -> bool:
    """True for the first bytes of a PNG or WEBP picture."""
    return start.startswith(PNG) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def words(path: Path) -> dict[str, Tensor]:
    """The vectors that a picture holds, by token; by `clip_l` and `clip_g` where there are two text encoders.

    A text chunk `sd-ti-embedding`, base64 of JSON; else the older form: both edges, apart from the picture by a black column,
    hold a deflated JSON text in the low four bits of their pixels, each hidden by a fixed series of numbers.

    Raises:
        LoadError: there is no word in it, or it is damaged or larger than any word.
    Source: AUTOMATIC1111/stable-diffusion-webui `modules/textual_inversion/image_embedding.py`.
    """
    size = path.stat().st_size
    if size > LARGEST_FILE:
        message = f"{path}: a picture of {size:,} bytes; at most {LARGEST_FILE:,} are read."
        raise LoadError(message, file=path, given=size, expected=LARGEST_FILE)
    try:
        text = _chunk(path)
        packed = base64.b64decode(text, validate=True) if text is not None else _pixels(path)
        if len(packed) > LARGEST_TEXT:
            raise LoadError(f"more than {LARGEST_TEXT:,} bytes", given=len(packed), expected=LARGEST_TEXT)
        return _vectors(json.loads(packed.decode(), object_pairs_hook=unique))
    except (LoadError, ValueError, RecursionError, OverflowError, binascii.Error, zlib.error) as error:
        if isinstance(error, LoadError) and error.file is not None:
            raise
        message = f"{path}: the word in this picture cannot be read ({error}). It is damaged, or was scaled or converted."
        raise LoadError.from_error(error, message, file=path) from error


def _vectors(found: Any) -> dict[str, Tensor]:
    """Name, in lower case as tokenizers keep it, and vectors. Tensors are `{"TORCHTENSOR": [[…]]}`."""
    if not isinstance(found, dict):
        raise LoadError("no JSON object", given=type(found).__name__, expected="JSON object")
    held = found.get("string_to_param")
    if isinstance(held, dict) and held:
        name = found.get("name") or UNNAMED
        if not isinstance(name, str) or len(held) > 1:
            raise LoadError(f"{len(held)} words, or a name that is no text", given=tuple(held), expected=1)
        name.encode()  # half a surrogate pair is no text
        tensors = {name.lower(): next(iter(held.values()))}
    else:
        tensors = {key: found[key] for key in ENCODERS if key in found}
    if not tensors:
        raise LoadError("no string_to_param, clip_l or clip_g", missing=["string_to_param", *ENCODERS])
    return {name: _tensor(value) for name, value in tensors.items()}


def _tensor(value: Any) -> Tensor:
    rows = value.get("TORCHTENSOR") if isinstance(value, dict) else None
    rows = [rows] if isinstance(rows, list) and rows and not isinstance(rows[0], list) else rows
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise LoadError("no vectors", given=type(value).__name__, expected="vectors")
    if len({len(row) for row in rows}) != 1 or len(rows) * len(rows[0]) > LARGEST_WORD or not rows[0]:
        given = tuple(len(row) for row in rows)
        raise LoadError(f"{len(rows)} vectors that are no matrix", given=given, expected="matrix")
    if not all(type(number) in (int, float) for row in rows for number in row):
        raise LoadError("vectors of something that is no number", given=type(rows[0][0]).__name__, expected="number")
    return torch.tensor(rows, dtype=torch.float32)


def _chunk(path: Path) -> bytes | None:
    """The text under `sd-ti-embedding` of a PNG, or None."""
    for kind, data in _chunks(path):
        key, _, text = data.partition(b"\0")
        if kind in (b"tEXt", b"zTXt") and key == CHUNK.encode():
            return _unpacked(text[1:]) if kind == b"zTXt" else text
    return None


def _chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    data = path.read_bytes()
    at = len(PNG)
    while data.startswith(PNG) and at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            message = f"{path}: this picture is cut short: copy it again from its source."
            raise LoadError(message, file=path, given=len(data), expected=at + 12 + length)
        yield kind, data[at + 8 : at + 8 + length]
        at += 12 + length


def _pixels(path: Path) -> bytes:
    """The text in the low bits of both edges.

    Raises:
        LoadError: there is none.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "WEBP")) as picture:
            if math.prod(picture.size) > LARGEST_PICTURE:
                raise LoadError(
                    f"{path}: a picture of {picture.size[0]}×{picture.size[1]} pixels; at most {LARGEST_PICTURE:,} are read.",
                    file=path,
                    given=picture.size,
                    expected=LARGEST_PICTURE,
                )
            shown = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LoadError(f"{path}: this picture cannot be read ({error}).", file=path) from error
    bright: Any = (shown > 0).all(2)
    columns, rows = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
    low: Any = shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15 if len(columns) else shown[:0] & 15
    black = np.flatnonzero(low.sum((0, 2), dtype=np.int64) == 0) if low.size else np.array([])
    if len(black) < 2:
        raise LoadError(
            f"{path}: a picture without a learned word: no text '{CHUNK}' in it, and no edges that hold one. Was it scaled, or "
            "saved again by a program that drops what it does not know?",
            file=path,
            missing=[CHUNK],
        )
    halves = [_shown(half) for half in (low[:, : black[0]], low[:, black[-1] + 1 :])]
    if halves[0].size != halves[1].size:
        raise LoadError("edges of two sizes", given=tuple(half.size for half in halves))
    return _unpacked((halves[1] << 4 | halves[0]).tobytes())


def _shown(block: Any) -> Any:
    """What was hidden by exclusive or with the low bits of the series."""
    return block.reshape(-1) ^ (series(block.size) & 15)


def series(count: int) -> NDArray[np.uint8]:
    """s(n) mod 255, s(n) = 1664525·s(n−1) + 1013904223 mod 2³², s(0) = 0, for n = 1, 2, …; by doubling."""
    if not count:
        return np.zeros(0, np.uint8)
    a, c, whole = 1664525, 1013904223, 1 << 32
    found = np.array([c], np.uint64)
    while len(found) < count:  # s(n + m) = aᵐ·s(n) + cₘ
        found = np.concatenate([found, (found * np.uint64(a) + np.uint64(c)) % np.uint64(whole)])
        a, c = a * a % whole, (a * c + c) % whole
    return (found[:count] % np.uint64(255)).astype(np.uint8)


def _unpacked(data: bytes) -> bytes:
    """Inflated, up to a limit; what follows the end is filling."""
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, LARGEST_TEXT)
    if not inflater.eof:
        message = f"more than {LARGEST_TEXT:,} bytes" if len(text) >= LARGEST_TEXT else "it ends too soon"
        raise LoadError(message, given=len(text), expected=LARGEST_TEXT)
    return text
