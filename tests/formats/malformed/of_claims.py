"""Files for a network of other sizes with consistent tensors; and claimed sizes without bytes."""

from __future__ import annotations

import math
import re
import struct
from random import Random

from tests.formats.malformed.draft import Draft, mutation


def wordings(name: str) -> str:
    """A name without its indices."""
    return re.sub(r"\d+", "#", name)


@mutation("tensors")
def another_width(draft: Draft, rng: Random) -> None:
    """Change every dimension of some size in all tensors of one part, or of the file."""
    name = draft.pick(rng)
    start = rng.choice([name.partition(".")[0], name.rpartition(".")[0], ""])
    length = rng.choice(draft.entries[name]["shape"] or [1])
    other = max(1, length + rng.choice([-1, 1, length, length // 2]))
    for each in [n for n in draft.entries if n.startswith(start) and length in draft.entries[n]["shape"]]:
        shape = [other if side == length else side for side in draft.entries[each]["shape"]]
        draft.take(each)
        draft.put(each, "F32", shape, struct.pack("<f", rng.gauss(0, 0.5)) * math.prod(shape))


@mutation("tensors")
def a_layer_lost(draft: Draft, rng: Random) -> None:
    """Remove all tensors with one index, often the last, at one position of their names."""
    pieces = re.split(r"(\d+)", draft.pick(rng))
    if len(pieces) == 1:
        return
    at = rng.randrange(1, len(pieces), 2)
    start = wordings("".join(pieces[:at]))
    numbers = {}
    for name in draft.entries:
        parts = re.split(r"(\d+)", name)
        if len(parts) > at and wordings("".join(parts[:at])) == start:
            numbers[name] = int(parts[at])
    lost = rng.choice([max(numbers.values()), int(pieces[at])])
    for name in [name for name, number in numbers.items() if number == lost]:
        if len(draft.entries) > 1:
            draft.take(name)


@mutation("tensors")
def many_more_layers(draft: Draft, rng: Random) -> None:
    """Empty tensors under the names of layers that do not exist."""
    name = draft.pick(rng)
    pieces = re.split(r"(\d+)", name)
    at = rng.randrange(1, len(pieces), 2) if len(pieces) > 1 else 0
    shape = rng.choice([[0], [0, 8], [10**6, 0], [0 if i == 0 else n for i, n in enumerate(draft.entries[name]["shape"])]])
    for number in range(rng.choice([20, 65, 300])):
        more = f"{name}.{number}" if not at else "".join([*pieces[:at], str(number + rng.choice([0, 1])), *pieces[at + 1 :]])
        if more not in draft.entries:
            draft.put(more, "F32", shape if math.prod(shape) == 0 else [0], b"")


@mutation("tensors")
def sides_without_numbers(draft: Draft, rng: Random) -> None:
    """Shapes with one zero dimension and huge others: in one tensor, in a part, in all."""
    name = draft.pick(rng)
    start = rng.choice([name, name.partition(".")[0], name.rpartition(".")[0], ""])
    nothing, huge = rng.randrange(4), rng.choice([10**6, 10**6, 10**3, 10**4])
    for each in [n for n in draft.entries if n.startswith(start)]:
        shape = list(draft.entries[each]["shape"])
        if shape:
            wide = [huge if rng.random() < 0.7 else side for side in shape]
            wide[nothing % len(shape)] = 0
            draft.take(each)
            draft.put(each, "F32", wide, b"")


TEXTS = ["", "block", "stem", "Block", "roof", "pt", "x" * 10**5, "\n", "None", "1", "block\0", " stem", "🦆", "true"]


@mutation("tensors")
def another_remark(draft: Draft, rng: Random) -> None:
    """Change a text of the metadata, or add another one with a meaning."""
    keys = [*draft.metadata, *draft.metadata, "place", "format"]
    draft.metadata[rng.choice(keys)] = rng.choice(TEXTS)
