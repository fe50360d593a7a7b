"""Parses the header of an untrusted safetensors file incrementally, with memory bounded by the header's length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NamedTuple

# bytes per element; other safetensors dtypes (packed four bits, complex, …) do not occur in adapters
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_NAME, MAX_ENTRY = 1_000, 4_000  # characters
MAX_TENSORS, MAX_METADATA_ENTRIES, MAX_DIMS = 32_768, 10_000, 8
MAX_DIM = 1_000_000  # of an empty tensor, whose shape the size of the file does not bound
_SPACE = re.compile(r"[ \t\n\r]*")
_KEYS = {"dtype", "shape", "data_offsets"}


class HeaderEntry(NamedTuple):
    """Header entry of a tensor: its bytes are those from `start` to `stop`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """`metadata`, and the entry of each tensor by name, in the order of the header."""

    metadata: dict[str, str]
    entries: dict[str, HeaderEntry]

    @property
    def needed(self) -> int:
        """Total bytes of all tensors."""
        return max((entry.stop for entry in self.entries.values()), default=0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor.

        Raises:
            ValueError: a shape does not match its byte range, or byte ranges overlap or leave gaps.
        """
        end, before = 0, "the header"
        for name, (dtype, shape, start, stop) in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            size = math.prod(shape) * SIZES[dtype]
            if stop - start != size:
                what = f"{_shorten(shape)} of {dtype}, {_shorten(size)} bytes"
                raise ValueError(f"'{_shorten(name)}' is {what}, but has the byte range {_shorten([start, stop])}")
            if not size and max(shape) > MAX_DIM:
                raise ValueError(f"'{_shorten(name)}' is empty and has the shape {_shorten(shape)}")
            if start != end:
                how = "before" if start < end else f"{start - end:,} bytes after"
                raise ValueError(f"'{_shorten(name)}' starts {how} the end of '{_shorten(before)}'; tensors must be contiguous")
            end, before = stop, name
        return {name: entry.shape for name, entry in self.entries.items()}


def parse(raw: bytes) -> Header:
    """Parses a header and checks its types and the uniqueness of its keys.

    Raises:
        ValueError: describes the error; may be a subclass, such as UnicodeDecodeError for invalid UTF-8.
    """
    scan = _Scanner(raw.decode())
    if not scan.text.startswith("{"):
        raise ValueError("it does not begin with '{'")
    metadata: dict[str, str] | None = None
    entries: dict[str, HeaderEntry] = {}
    for name in scan.object():
        if name in entries or (name == "__metadata__" and metadata is not None):
            raise ValueError(f"duplicate key '{_shorten(name)}'")
        if name == "__metadata__":
            metadata = scan.texts()
        elif len(entries) == MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS:,} tensors")
        else:
            entries[name] = _check_entry(name, scan.small())
    scan.end()
    return Header(metadata or {}, entries)


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`; rejects ambiguous duplicate keys.

    Raises:
        ValueError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"duplicate key '{_shorten(first_duplicate(name for name, _ in pairs))}'")
    return found


def first_duplicate(names: Iterable[str]) -> str | None:
    """The first name that occurs twice, or None."""
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


_ENTRY = json.JSONDecoder(object_pairs_hook=unique_keys)


class _Scanner:
    """A position in untrusted JSON text."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def take(self) -> str:
        """The next character that is not white space."""
        self.at = _SPACE.match(self.text, self.at).end() + 1  # type: ignore[union-attr]
        return self.text[self.at - 1 : self.at]

    def expect(self, character: str, what: str) -> None:
        if self.take() != character:
            raise ValueError(f"expected {what} at character {self.at}")

    def string(self) -> str:
        self.expect('"', "a string")
        value: str
        value, self.at = scanstring(self.text, self.at)
        if not value.isascii():
            value.encode()  # raises for a lone surrogate
        return value

    def object(self) -> Iterator[str]:
        """The keys of an object; the caller consumes the value of a key before requesting the next."""
        self.expect("{", "an object")
        start = self.at
        if self.take() == "}":
            return
        self.at = start
        while True:
            key = self.string()
            if len(key) > MAX_NAME:
                raise ValueError(f"name of {len(key):,} characters, '{_shorten(key)}'; at most {MAX_NAME:,} are supported")
            self.expect(":", "a colon")
            yield key
            after = self.take()
            if after == "}":
                return
            if after != ",":
                raise ValueError(f"expected a comma or the end of an object at character {self.at}")

    def texts(self) -> dict[str, str]:
        """An object of strings; null counts as empty."""
        start = self.at
        if self.take() == "n" and self.text.startswith("null", self.at - 1):
            self.at += 3
            return {}
        self.at = start
        found: dict[str, str] = {}
        for key in self.object():
            if key in found or len(found) == MAX_METADATA_ENTRIES:
                raise ValueError(
                    f"duplicate key '{_shorten(key)}'" if key in found else f"more than {MAX_METADATA_ENTRIES:,} metadata entries"
                )
            found[key] = self.string()
        return found

    def small(self) -> Any:
        """An object without nested objects."""
        self.expect("{", "a tensor's entry")
        start, stop = self.at - 1, self.text.find("}", self.at, self.at + MAX_ENTRY) + 1
        if not stop:
            raise ValueError(f"unterminated tensor entry at character {start + 1}")
        self.at = stop
        return _ENTRY.decode(self.text[start:stop])

    def end(self) -> None:
        if self.take():
            raise ValueError(f"trailing text at character {self.at}")


def _check_entry(name: str, entry: dict[str, Any]) -> HeaderEntry:
    """Validates a tensor's entry."""
    label = _shorten(name)
    if entry.keys() != _KEYS:
        raise ValueError(f"'{label}' has {_shorten(', '.join(entry))}; expected {', '.join(sorted(_KEYS))}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"'{label}' has dtype {_shorten(dtype)}; supported: {', '.join(SIZES)}")
    if not (isinstance(shape, list) and len(shape) <= MAX_DIMS and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"'{label}' has the shape {_shorten(shape)}; expected a list of up to {MAX_DIMS} integers ≥ 0")
    if not (isinstance(place, list) and len(place) == 2 and all(type(n) is int and n >= 0 for n in place)):
        raise ValueError(f"'{label}' has the offsets {_shorten(place)}; expected two integers ≥ 0")
    return HeaderEntry(dtype, tuple(shape), *place)


def _shorten(value: Any) -> str:
    """A value of the file, shortened for an error message."""
    text = value if isinstance(value, str) else str(value) if not isinstance(value, int) or abs(value) < 10**30 else "over 10³⁰"
    text = text.encode(errors="replace").decode() if not text.isascii() else text
    return text if len(text) <= 80 else f"{text[:80]}…"
