"""Images that embed a textual-inversion token, as A1111's web UI writes them: in a text chunk or in low bits of the edges."""

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

from .header import unique_keys

PNG, CHUNK = b"\x89PNG\r\n\x1a\n", "sd-ti-embedding"
MAX_FILE_BYTES, MAX_TEXT_BYTES, MAX_PIXELS = 32_000_000, 6_000_000, 8_000_000  # bytes, bytes when unpacked, pixels
MAX_ELEMENTS = 1_000_000  # elements
ENCODERS = ("clip_l", "clip_g")
UNNAMED = "emb_params"  # as in sd-scripts' files, which name no token


def is_image(start: bytes) -> bool:
    """True for the first bytes of a PNG or WEBP image."""
    return start.startswith(PNG) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def read_embeddings(path: Path) -> dict[str, Tensor]:
    """The vectors embedded in an image, by token; by `clip_l` and `clip_g` for two text encoders.

    They are in a text chunk `sd-ti-embedding`, base64 of JSON. The older form stores deflated JSON in the low four bits of the
    pixels at both edges, each separated from the image by a black column and masked by a fixed pseudo-random series.

    Raises:
        LoadError: the image has no embedding, or it is corrupt or too large.
    Source: AUTOMATIC1111/stable-diffusion-webui `modules/textual_inversion/image_embedding.py`.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        message = f"{path}: image of {size:,} bytes; at most {MAX_FILE_BYTES:,} are supported."
        raise LoadError(message, file=path, given=size, expected=MAX_FILE_BYTES)
    try:
        text = _find_chunk(path)
        packed = base64.b64decode(text, validate=True) if text is not None else _read_edges(path)
        if len(packed) > MAX_TEXT_BYTES:
            raise LoadError(f"more than {MAX_TEXT_BYTES:,} bytes", given=len(packed), expected=MAX_TEXT_BYTES)
        return _parse_vectors(json.loads(packed.decode(), object_pairs_hook=unique_keys))
    except (LoadError, ValueError, RecursionError, OverflowError, binascii.Error, zlib.error) as error:
        if isinstance(error, LoadError) and error.file is not None:
            raise
        message = f"{path}: cannot read the embedding in this image ({error}). It is corrupt, or was scaled or converted."
        raise LoadError.from_error(error, message, file=path) from error


def _parse_vectors(found: Any) -> dict[str, Tensor]:
    """Name, in lower case as tokenizers use it, and vectors. Tensors are `{"TORCHTENSOR": [[…]]}`."""
    if not isinstance(found, dict):
        raise LoadError("not a JSON object", given=type(found).__name__, expected="JSON object")
    params = found.get("string_to_param")
    if isinstance(params, dict) and params:
        name = found.get("name") or UNNAMED
        if not isinstance(name, str) or len(params) > 1:
            raise LoadError(f"{len(params)} embeddings, or a name that is not a string", given=tuple(params), expected=1)
        name.encode()  # raises for a lone surrogate
        tensors = {name.lower(): next(iter(params.values()))}
    else:
        tensors = {key: found[key] for key in ENCODERS if key in found}
    if not tensors:
        raise LoadError("no string_to_param, clip_l or clip_g", missing=["string_to_param", *ENCODERS])
    return {name: _parse_tensor(value) for name, value in tensors.items()}


def _parse_tensor(value: Any) -> Tensor:
    rows = value.get("TORCHTENSOR") if isinstance(value, dict) else None
    rows = [rows] if isinstance(rows, list) and rows and not isinstance(rows[0], list) else rows
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise LoadError("no vectors", given=type(value).__name__, expected="vectors")
    if len({len(row) for row in rows}) != 1 or len(rows) * len(rows[0]) > MAX_ELEMENTS or not rows[0]:
        lengths = tuple(len(row) for row in rows)
        raise LoadError(f"{len(rows)} vectors that do not form a matrix", given=lengths, expected="matrix")
    if not all(type(number) in (int, float) for row in rows for number in row):
        raise LoadError("vectors with elements that are not numbers", given=type(rows[0][0]).__name__, expected="number")
    return torch.tensor(rows, dtype=torch.float32)


def _find_chunk(path: Path) -> bytes | None:
    """Text under `sd-ti-embedding` in a PNG, or None."""
    for kind, data in _chunks(path):
        key, _, text = data.partition(b"\0")
        if kind in (b"tEXt", b"zTXt") and key == CHUNK.encode():
            return _decompress(text[1:]) if kind == b"zTXt" else text
    return None


def _chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    data = path.read_bytes()
    at = len(PNG)
    while data.startswith(PNG) and at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            message = f"{path}: this image is truncated. Copy it again from its source."
            raise LoadError(message, file=path, given=len(data), expected=at + 12 + length)
        yield kind, data[at + 8 : at + 8 + length]
        at += 12 + length


def _read_edges(path: Path) -> bytes:
    """The text in the low bits of both edges.

    Raises:
        LoadError: the edges hold no embedding.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "WEBP")) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise LoadError(
                    f"{path}: image of {image.size[0]}×{image.size[1]} pixels; at most {MAX_PIXELS:,} are supported.",
                    file=path,
                    given=image.size,
                    expected=MAX_PIXELS,
                )
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LoadError(f"{path}: cannot read this image ({error}).", file=path) from error
    bright: Any = (pixels > 0).all(2)
    columns, rows = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
    low: Any = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15 if len(columns) else pixels[:0] & 15
    black = np.flatnonzero(low.sum((0, 2), dtype=np.int64) == 0) if low.size else np.array([])
    if len(black) < 2:
        raise LoadError(
            f"{path}: image without a token embedding: it has no text chunk '{CHUNK}' and no embedding in its edges. Scaling it, "
            "or saving it with another program, may have removed the embedding.",
            file=path,
            missing=[CHUNK],
        )
    halves = [_unmask(half) for half in (low[:, : black[0]], low[:, black[-1] + 1 :])]
    if halves[0].size != halves[1].size:
        raise LoadError("edges of two sizes", given=tuple(half.size for half in halves))
    return _decompress((halves[1] << 4 | halves[0]).tobytes())


def _unmask(block: Any) -> Any:
    """Removes the mask: exclusive or with the low bits of the series."""
    return block.reshape(-1) ^ (mask_series(block.size) & 15)


def mask_series(count: int) -> NDArray[np.uint8]:
    """s(n) mod 255, s(n) = 1664525·s(n−1) + 1013904223 mod 2³², s(0) = 0, for n = 1, 2, …; by doubling."""
    if not count:
        return np.zeros(0, np.uint8)
    a, c, whole = 1664525, 1013904223, 1 << 32
    found = np.array([c], np.uint64)
    while len(found) < count:  # s(n + m) = aᵐ·s(n) + cₘ
        found = np.concatenate([found, (found * np.uint64(a) + np.uint64(c)) % np.uint64(whole)])
        a, c = a * a % whole, (a * c + c) % whole
    return (found[:count] % np.uint64(255)).astype(np.uint8)


def _decompress(data: bytes) -> bytes:
    """Decompresses up to a limit; ignores padding after the end."""
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, MAX_TEXT_BYTES)
    if not inflater.eof:
        message = f"more than {MAX_TEXT_BYTES:,} bytes" if len(text) >= MAX_TEXT_BYTES else "truncated"
        raise LoadError(message, given=len(text), expected=MAX_TEXT_BYTES)
    return text
