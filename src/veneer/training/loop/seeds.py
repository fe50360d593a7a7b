"""Random numbers that depend on what they are for, never on how many were drawn before.

Every draw of a training run comes from `generator(seed, purpose, step, index)`. A resumed run, a run on several processes and an
uninterrupted one therefore see the same numbers, and a checkpoint need not hold any generator's state.
"""

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """A seed in [0, 2^63) for a tuple of integers and words: the first 63 bits of BLAKE2b over their unambiguous spelling.

    The same on every machine, operating system and Python version. `mix(1, 23)` and `mix(12, 3)` differ, and so do `mix(1)` and
    `mix("1")`.

    Raises:
        TypeError: a part is neither `int` nor `str` (a float has no single spelling; a tensor or numpy number would hide one).
    """
    spelling = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"mix: {part!r} is a {type(part).__name__}; expected int or str. Convert it, as in mix(int(x)).")
        text = str(part).encode("utf-8", "surrogatepass")
        spelling.update(b"%s%d:%s" % (b"i" if isinstance(part, int) else b"s", len(text), text))
    return int.from_bytes(spelling.digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded with `mix(*parts)`. Draw on the CPU and move, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(mix(*parts))
