"""Mutations of the header of a safetensors file."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

from tests.formats.malformed.draft import Draft, mutation


@mutation("tensors")
def length_that_is_not(draft: Draft, rng: Random) -> bytes:
    data = draft.data()
    length = int.from_bytes(data[:8], "little")
    claims = [0, 1, 2, length - 1, length + 1, length * 2, 2**31, 2**40, 2**62, 2**63, 2**64 - 1]
    return struct.pack("<Q", rng.choice(claims)) + data[8:]


@mutation("tensors")
def another_entry(draft: Draft, rng: Random) -> None:
    nonsense: list[Any] = [None, 5, "x", [], {}, [1, 2], True, {"dtype": "F32"}, {"dtype": "F32", "shape": [1]}]
    draft.entries[draft.pick(rng)] = rng.choice([*nonsense, {"shape": [], "data_offsets": [0, 0]}])


SHAPES: list[Any] = [
    [-1, 4], [2**31, 2**31, 4], [2**63], [2**64, 0], [10**9, 10**3], [2**32, 2**32], [10**30], [0], [0, 8], [10**9, 0],
    [2**40, 0, 2**40], [0] * 3, [1] * 65, [1] * 5000, [1.0], [1e9], ["2", "4"], [[2], 4], [True], [None], [4, math.nan],
    "24", None, {}, -1, 8,
]  # fmt: skip


@mutation("tensors")
def another_shape(draft: Draft, rng: Random) -> None:
    draft.entries[draft.pick(rng)]["shape"] = rng.choice(SHAPES)


@mutation("tensors")
def turned_shape(draft: Draft, rng: Random) -> None:
    """Another shape of the same size: dimensions swapped, one split, all flattened."""
    entry = draft.entries[draft.pick(rng)]
    shape, size = entry["shape"], math.prod(entry["shape"])
    other = [shape[::-1], [size], [1, size], [size, 1], [*shape, 1], [1, *shape], [*shape, 1, 1], rng.sample(shape, len(shape))]
    other += [[*shape[:-1], n, shape[-1] // n] for n in (2, 3) if shape and shape[-1] % n == 0]
    other += [[shape[0] // 2, 2 * shape[1], *shape[2:]] for _ in "x" if len(shape) > 1 and shape[0] % 2 == 0]
    entry["shape"] = rng.choice(other)


@mutation("tensors")
def another_dtype(draft: Draft, rng: Random) -> None:
    known = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"]
    other: list[Any] = ["U16", "U32", "U64", "C64", "F8_E8M0", "F4", "F6_E2M3", "f32", "", "float", None, 5, [], {}]
    draft.entries[draft.pick(rng)]["dtype"] = rng.choice(known + other)


@mutation("tensors")
def same_bytes_as_another_dtype(draft: Draft, rng: Random) -> None:
    """Types of the same size, and others with an adjusted last dimension."""
    entry = draft.entries[draft.pick(rng)]
    size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // max(math.prod(entry["shape"]), 1)
    kinds = {8: "I64 F64 U64 C64", 4: "I32 U32 F32", 2: "F16 BF16 I16 U16", 1: "U8 I8 BOOL F8_E4M3 F8_E5M2"}
    wanted = rng.choice(list(kinds))
    entry["dtype"] = rng.choice(kinds[wanted].split())
    if entry["shape"]:
        entry["shape"][-1] = entry["shape"][-1] * size // wanted


@mutation("tensors")
def other_offsets(draft: Draft, rng: Random) -> None:
    entry = draft.entries[draft.pick(rng)]
    start, stop = entry["data_offsets"]
    space = len(draft.body)
    entry["data_offsets"] = rng.choice([
        [stop, start], [start + 4, stop + 4], [start, stop - 4], [start, stop + 4], [0, stop - start], [-4, stop],
        [start, 2**62], [2**70, 2**71], [space, space], [start, start], [start], [], None, "x", [start, stop, stop],
        [float(start), float(stop)], [str(start), str(stop)], [True, stop], [start, None], {"0": start, "1": stop},
    ])  # fmt: skip


@mutation("tensors")
def a_gap(draft: Draft, rng: Random) -> None:
    """Bytes between two tensors that belong to none."""
    at = rng.choice([e["data_offsets"][0] for e in draft.entries.values()])
    draft.body = draft.body[:at] + bytes(8) + draft.body[at:]
    for entry in draft.entries.values():
        if entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [n + 8 for n in entry["data_offsets"]]


@mutation("tensors")
def one_place_for_two(draft: Draft, rng: Random) -> None:
    """Two tensors of one size at the same offset."""
    first, second = (draft.entries[draft.pick(rng)] for _ in "12")
    first["data_offsets"] = list(second["data_offsets"])


@mutation("tensors")
def key_twice(draft: Draft, rng: Random) -> bytes:
    """One name twice in the JSON, with one entry or two."""
    name, other = draft.pick(rng), draft.pick(rng)
    twice = json.dumps({name: draft.entries[rng.choice([name, other])]})
    text = json.dumps(draft.header())
    return draft.data(rng.choice([text[:-1] + ", " + twice[1:], twice[:-1] + ", " + text[1:]]))


@mutation("tensors")
def metadata_twice(draft: Draft, rng: Random) -> bytes:
    again = draft.metadata if rng.random() < 0.5 else {"format": "pt"}
    told = json.dumps({"__metadata__": draft.metadata, **draft.entries})
    return draft.data(f'{told[:-1]}, "__metadata__": {json.dumps(again)}}}')


METADATA: list[Any] = [
    5, "x", [], [["a", "b"]], {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {"b": "c"}}, {"a": True}, None, {}, True, 1e999,
    {"x" * 1000: "y"},
]  # fmt: skip


@mutation("tensors")
def other_metadata(draft: Draft, rng: Random) -> bytes:
    value = rng.choice(METADATA)
    merged = {**draft.metadata, **value} if isinstance(value, dict) and rng.random() < 0.5 else value
    return draft.data(json.dumps({"__metadata__": merged, **draft.entries}))


@mutation("tensors")
def metadata_lost(draft: Draft, rng: Random) -> None:
    draft.metadata = {} if rng.random() < 0.5 else {k: v for k, v in draft.metadata.items() if rng.random() < 0.5}


@mutation("tensors", loads=True)
def one_more_remark(draft: Draft, rng: Random) -> None:
    """A metadata key that is not read."""
    draft.metadata[f"remark_{rng.random()}"] = "said by ñobody \u2603" * rng.choice([1, 1000])


@mutation("tensors", loads=True)
def header_in_another_order(draft: Draft, rng: Random) -> bytes:
    """Change the order of the header's keys, or spaces around it; neither has a meaning."""
    header = draft.header()
    names = list(header)
    rng.shuffle(names)
    text = json.dumps({name: header[name] for name in names}, indent=rng.choice([None, 1]))
    return draft.data(text + " " * rng.choice([0, 1, 7, 4096]))


@mutation("tensors")
def a_header_of_spaces(draft: Draft, rng: Random) -> bytes:
    """Megabytes of white space, around the header or within."""
    text, wide = json.dumps(draft.header()), " " * rng.choice([10**5, 4 * 10**6, 3 * 10**7])
    return draft.data(rng.choice([text + wide, wide + text, text[:1] + wide + text[1:], wide]))


@mutation("tensors")
def a_header_of_much(draft: Draft, rng: Random) -> bytes:
    """Megabytes of JSON that take much memory when parsed, or are deeply nested."""
    n, what = rng.choice([10**3, 10**5, 10**6]), rng.choice(["list", "depth", "entries", "tensors", "remarks"])
    if what in ("entries", "tensors"):
        entry = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' if what == "tensors" else "{}"
        more = ", ".join(f'"k{i}": {entry}' for i in range(min(n, 10**5)))
    elif what == "remarks":
        more = '"__metadata__": {' + ", ".join(f'"k{i}": ""' for i in range(min(n, 10**5))) + "}"
    else:
        many = rng.choice(["[],", "{},", '"ab",', "1.5,", "7,"]) * n
        more = '"x": ' + ("[" * n + "]" * n if what == "depth" else f"[{many}1]")
    return draft.data(f"{json.dumps(draft.header())[:-1]}, {more}}}")
