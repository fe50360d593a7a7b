"""The C library's allocator, told to keep what is freed: steps on a CPU then do not fetch the same pages from the system again.

glibc gives each large block back as soon as it is freed. Every step asks for blocks of the same sizes, and each page of them is
cleared anew by the system: on two cores 8 % of a step of a ViT-S/16 at a batch of eight. Kept, they make the process no larger
at its peak (measured: 1 %), but it stays that large until it ends. So the `veneer` command does this, in its own process; who
uses the library decides for theirs.

A server is another matter: it lives long, and its threads come and go. glibc gives many of them a heap of their own, and what
is free in one is no use to another, so with each round of pictures the process gets larger, and never smaller. `veneer app`
gives back what is freed, and lets all threads share two heaps.
"""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8
"""Numbers of `mallopt`'s parameters in glibc: `M_TRIM_THRESHOLD`, `M_TOP_PAD`, `M_MMAP_MAX`, `M_ARENA_MAX`."""

SETTINGS = ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 64 << 20))
"""No block of its own from the system, nothing given back, and 64 MiB more each time that the heap grows."""

CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables of the environment by which a user sets the same; they are left to have their way."""


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, from now on.

    Returns:
        True if it is kept; False where there is no glibc or the environment has settings of its own (`CHOSEN`).
    """
    return _set(SETTINGS, CHOSEN)


def share_freed_memory() -> bool:
    """Let all threads of this process use what one of them has freed: no more than two heaps, from now on.

    Returns:
        True if it is shared; False where there is no glibc or the environment has settings of its own.
    """
    return _set(((ARENA_MAX, 2),), ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"))


def _set(settings: tuple[tuple[int, int], ...], chosen: tuple[str, ...]) -> bool:
    if not sys.platform.startswith("linux") or any(name in os.environ for name in chosen):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(number, value) for number, value in settings)
