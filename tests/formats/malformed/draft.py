"""A file that is being mutated, and the list of mutations."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from tests.formats.malformed.good_files import Good

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Draft:
    """Parts of a safetensors file.

    Args:
        entries: of its header. `body`: the bytes after it.
        config: of the folder, if there is one, in `place`. `text`: written instead of it.
    """

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, Any]
    body: bytes
    config: Any = None
    place: str = ""
    text: str | None = None

    @classmethod
    def of(cls, good: Good) -> Draft:
        data, place = good.files[good.main], next((name for name in good.files if name.endswith(".json")), "")
        length = int.from_bytes(data[:8], "little")
        entries, config = json.loads(data[8 : 8 + length]), json.loads(good.files[place]) if place else None
        return cls(entries, entries.pop("__metadata__", {}), data[8 + length :], config, place)

    def header(self) -> dict[str, Any]:
        return {"__metadata__": self.metadata, **self.entries} if self.metadata else dict(self.entries)

    def data(self, header: str | bytes | None = None) -> bytes:
        """The file's bytes. `header`: instead of the correct one."""
        text = json.dumps(self.header()) if header is None else header
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw + self.body

    def files(self, main: str, data: bytes | None) -> dict[str, bytes]:
        """The files by name. `data`: the main one, if it differs from this draft."""
        found = {main: self.data() if data is None else data}
        if self.config is not None:
            text = json.dumps(self.config) if self.text is None else self.text
            found[self.place] = text.encode("utf-8", "surrogatepass")
        return found

    def pick(self, rng: Random, dtype: str | None = None) -> str:
        """The name of any tensor, or of one of a type."""
        return rng.choice([n for n, entry in self.entries.items() if dtype in (None, entry["dtype"])])

    def take(self, name: str) -> bytes:
        """Remove a tensor's bytes from the file; the others move up."""
        start, stop = self.entries.pop(name)["data_offsets"]
        taken, self.body = self.body[start:stop], self.body[:start] + self.body[stop:]
        for other in self.entries.values():
            if other["data_offsets"][0] >= stop:
                other["data_offsets"] = [n - (stop - start) for n in other["data_offsets"]]
        return taken

    def put(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        """Append a tensor."""
        self.entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(self.body), len(self.body) + len(data)]}
        self.body += data


@dataclass(frozen=True)
class Mutation:
    """One way to change a file.

    Args:
        kind: argument of `change`: `bytes` or `picture` (bytes, returns others), `tensors` or `json` (a `Draft`, changes it or
            returns its bytes), `path` (the path of a file and its bytes, returns the path to be loaded).
        loads: its result must load, so that a loader that rejects everything fails.
    """

    name: str
    kind: str
    change: Callable[..., Any]
    loads: bool = False

    def fits(self, good: Good) -> bool:
        return self.kind in ("bytes", "path") or self.kind in good.kinds


MUTATIONS: list[Mutation] = []


def mutation(kind: str, loads: bool = False) -> Callable[[Function], Function]:
    """Decorator that adds a function to the list; the mutation has its name."""

    def add(change: Function) -> Function:
        MUTATIONS.append(Mutation(change.__name__, kind, change, loads))
        return change

    return add
