"""Stateless random seeds: each random number depends on its purpose, not on how many were generated before.

All randomness of a training run comes from `generator(seed, purpose, step, index)`. A resumed run, a run on several processes and
an uninterrupted one are therefore equal, and checkpoints contain no generator state.
"""

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """A seed in [0, 2^63) for a tuple of integers and strings: the first 63 bits of BLAKE2b of an unambiguous encoding.

    The same on every machine, operating system and Python version. `mix(1, 23)` and `mix(12, 3)` differ, and so do `mix(1)` and
    `mix("1")`.

    Raises:
        TypeError: a part is neither `int` nor `str` (floats, tensors and numpy numbers have no unique encoding).
    """
    spelling = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"mix: {part!r} is a {type(part).__name__}; expected int or str. Convert it, as in mix(int(x)).")
        text = str(part).encode("utf-8", "surrogatepass")
        spelling.update(b"%s%d:%s" % (b"i" if isinstance(part, int) else b"s", len(text), text))
    return int.from_bytes(spelling.digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A new CPU generator seeded with `mix(*parts)`. Sample on the CPU and move, for the same numbers on every device."""
    return torch.Generator().manual_seed(mix(*parts))
