"""The header of a safetensors file, read without trust: piece by piece, so that it costs no more memory than its own length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NamedTuple

# bytes of one number; what else safetensors knows (packed four bits, complex numbers, …) is no weight of an adapter
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
LONGEST_NAME, LONGEST_ENTRY = 1_000, 4_000  # characters
MOST_TENSORS, MOST_REMARKS, MOST_SIDES = 32_768, 10_000, 8
LARGEST_SIDE = 1_000_000  # of a tensor without numbers, which no byte of the file vouches for
_SPACE = re.compile(r"[ \t\n\r]*")
_KEYS = {"dtype", "shape", "data_offsets"}


class Entry(NamedTuple):
    """What a header says of a tensor: its bytes are those from `start` to `stop`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """`metadata` and, by name and in the order of the header, what is said of each tensor."""

    metadata: dict[str, str]
    entries: dict[str, Entry]

    @property
    def needed(self) -> int:
        """Bytes for all tensors."""
        return max((entry.stop for entry in self.entries.values()), default=0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor.

        Raises:
            ValueError: a shape is not of the size that it lies in, or tensors lie over each other or apart.
        """
        end, before = 0, "the header"
        for name, (dtype, shape, start, stop) in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            size = math.prod(shape) * SIZES[dtype]
            if stop - start != size:
                what = f"{_short(shape)} of {dtype}, {_short(size)} bytes"
                raise ValueError(f"'{_short(name)}' is {what}, and lies at {_short([start, stop])}")
            if not size and max(shape) > LARGEST_SIDE:
                raise ValueError(f"'{_short(name)}' has no numbers and the shape {_short(shape)}")
            if start != end:
                how = "over" if start < end else f"{start - end:,} bytes after"
                raise ValueError(f"'{_short(name)}' lies {how} the end of '{_short(before)}'; tensors follow one another")
            end, before = stop, name
        return {name: entry.shape for name, entry in self.entries.items()}


def parse(raw: bytes) -> Header:
    """Read a header: what it says is of the right kinds, and nothing is there twice.

    Raises:
        ValueError: says what is wrong; it may be a subclass, such as that for bytes that are no UTF-8.
    """
    scan = _Scan(raw.decode())
    if not scan.text.startswith("{"):
        raise ValueError("it does not begin with '{'")
    metadata: dict[str, str] | None = None
    entries: dict[str, Entry] = {}
    for name in scan.object():
        if name in entries or (name == "__metadata__" and metadata is not None):
            raise ValueError(f"'{_short(name)}' is there twice")
        if name == "__metadata__":
            metadata = scan.texts()
        elif len(entries) == MOST_TENSORS:
            raise ValueError(f"more than {MOST_TENSORS:,} tensors")
        else:
            entries[name] = _checked(name, scan.small())
    scan.end()
    return Header(metadata or {}, entries)


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`: a key that is there twice would mean two things.

    Raises:
        ValueError: it is.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"'{_short(twice(name for name, _ in pairs))}' is there twice")
    return found


def twice(names: Iterable[str]) -> str | None:
    """The first name that was there before, or None."""
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


_ENTRY = json.JSONDecoder(object_pairs_hook=unique)


class _Scan:
    """A place in a text that should be JSON."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def take(self) -> str:
        """The next character that is no white space."""
        self.at = _SPACE.match(self.text, self.at).end() + 1  # type: ignore[union-attr]
        return self.text[self.at - 1 : self.at]

    def expect(self, wanted: str, what: str) -> None:
        if self.take() != wanted:
            raise ValueError(f"expected {what} at character {self.at}")

    def string(self) -> str:
        self.expect('"', "a text")
        value: str
        value, self.at = scanstring(self.text, self.at)
        if not value.isascii():
            value.encode()  # half a surrogate pair is no text
        return value

    def object(self) -> Iterator[str]:
        """The keys of an object; whoever takes one reads its value before the next."""
        self.expect("{", "an object")
        start = self.at
        if self.take() == "}":
            return
        self.at = start
        while True:
            key = self.string()
            if len(key) > LONGEST_NAME:
                raise ValueError(f"a name of {len(key):,} characters, '{_short(key)}'; at most {LONGEST_NAME:,} are read")
            self.expect(":", "a colon")
            yield key
            after = self.take()
            if after == "}":
                return
            if after != ",":
                raise ValueError(f"expected a comma or the end of an object at character {self.at}")

    def texts(self) -> dict[str, str]:
        """An object of texts; null is none."""
        start = self.at
        if self.take() == "n" and self.text.startswith("null", self.at - 1):
            self.at += 3
            return {}
        self.at = start
        found: dict[str, str] = {}
        for key in self.object():
            if key in found or len(found) == MOST_REMARKS:
                raise ValueError(f"'{_short(key)}' is there twice" if key in found else f"more than {MOST_REMARKS:,} remarks")
            found[key] = self.string()
        return found

    def small(self) -> Any:
        """An object without others in it."""
        self.expect("{", "a tensor's entry")
        start, stop = self.at - 1, self.text.find("}", self.at, self.at + LONGEST_ENTRY) + 1
        if not stop:
            raise ValueError(f"a tensor's entry without an end at character {start + 1}")
        self.at = stop
        return _ENTRY.decode(self.text[start:stop])

    def end(self) -> None:
        if self.take():
            raise ValueError(f"more text after its end, at character {self.at}")


def _checked(name: str, entry: dict[str, Any]) -> Entry:
    """A tensor's entry whose parts are of the right kinds."""
    shown = _short(name)
    if entry.keys() != _KEYS:
        raise ValueError(f"'{shown}' has {_short(', '.join(entry))}; expected {', '.join(sorted(_KEYS))}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"'{shown}' is of type {_short(dtype)}; known are {', '.join(SIZES)}")
    if not (isinstance(shape, list) and len(shape) <= MOST_SIDES and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"'{shown}' has the shape {_short(shape)}; expected a list of up to {MOST_SIDES} whole numbers from 0")
    if not (isinstance(place, list) and len(place) == 2 and all(type(n) is int and n >= 0 for n in place)):
        raise ValueError(f"'{shown}' has the offsets {_short(place)}; expected two whole numbers from 0")
    return Entry(dtype, tuple(shape), *place)


def _short(value: Any) -> str:
    """A value of the file as it may stand in an error."""
    text = value if isinstance(value, str) else str(value) if not isinstance(value, int) or abs(value) < 10**30 else "over 10³⁰"
    text = text.encode(errors="replace").decode() if not text.isascii() else text
    return text if len(text) <= 80 else f"{text[:80]}…"
