"""Contents of a file, read slowly and without veneer: bytes to numbers, and each format's equation written out in numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]  # path of a parameter to the base's own values
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}
SIZES = {**{name: np.dtype(kind).itemsize for name, kind in PLAIN.items()}, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")
LARGEST = float(np.finfo(np.float32).max)


class Malformed(Exception):
    """The bytes have no meaning, or an ambiguous one."""


def require(right: Any, what: str) -> None:
    if not right:
        raise Malformed(what)


def parsed(text: str | bytes, finite: bool = True) -> Any:
    """JSON without duplicate keys. `finite`: and with finite numbers only."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len({key for key, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    def never(constant: str) -> Any:
        require(not finite, constant)
        return float(constant.replace("Infinity", "inf"))

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=never)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from error


class Bytes:
    """A safetensors file: `arrays` in float64, `kinds` as they are stored, `metadata`."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        require(len(data) >= 8 and 2 <= length <= len(data) - 8, "no header")
        header = parsed(data[8 : 8 + length])
        require(isinstance(header, dict), "no object")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        require(isinstance(self.metadata, dict) and all(isinstance(v, str) for v in self.metadata.values()), "metadata")
        self.kinds: dict[str, str] = {}
        self.arrays: dict[str, Array] = {}
        body, end = data[8 + length :], 0
        for entry in header.values():
            require(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, "an entry")
            numbers = [*entry["shape"], *entry["data_offsets"]] if isinstance(entry["shape"], list) else [None]
            require(all(type(n) is int and n >= 0 for n in numbers) and len(entry["data_offsets"]) == 2, "numbers")
            require(entry["dtype"] in SIZES, "a dtype")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            require(start == end and stop - start == math.prod(entry["shape"]) * SIZES[entry["dtype"]], "offsets")
            require(stop <= len(body), "cut short")
            self.kinds[name], end = entry["dtype"], stop
            self.arrays[name] = numbers_of(body[start:stop], entry["dtype"]).reshape(entry["shape"])
            require(np.isfinite(self.arrays[name]).all() and (np.abs(self.arrays[name]) <= LARGEST).all(), "not finite")
        require(end == len(body), "bytes left")
        self.arrays = {name: self.arrays[name] for name in header}

    def weight(self, name: str) -> Array:
        """A floating-point tensor."""
        require(name in self.arrays and self.kinds[name] not in WHOLE, f"no weight {name}")
        return self.arrays[name]

    def number(self, name: str) -> float:
        require(self.arrays[name].size == 1, f"{name} is no number")
        return float(self.arrays[name].flatten()[0])


def numbers_of(data: bytes, kind: str) -> Array:
    if kind in PLAIN:
        return np.frombuffer(data, PLAIN[kind]).astype(np.float64)
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    bits, bias = (3, 7) if kind == "F8_E4M3" else (2, 15)
    return np.array([_eight(byte, bits, bias) for byte in data], np.float64)


def _eight(byte: int, bits: int, bias: int) -> float:
    sign, exponent, mantissa = -1 if byte & 128 else 1, (byte & 127) >> bits, byte & (1 << bits) - 1
    if (byte & 127) == 127 if bits == 3 else exponent == 31:
        return math.nan if bits == 3 or mantissa else sign * math.inf
    return sign * (mantissa + (1 << bits if exponent else 0)) * 2.0 ** (max(exponent, 1) - bias - bits)
