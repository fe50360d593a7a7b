"""Freed memory that is kept: no page of it is fetched from the system a second time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from veneer.allocator import CHOSEN

SCRIPT = """
import resource, sys
from veneer.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
for turn in range(9):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(80 << 20)
    del block
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str, **environment: str) -> tuple[bool, int]:
    """(was it kept, pages that eight more blocks of 80 MiB fetched)."""
    clean = {key: value for key, value in os.environ.items() if key not in CHOSEN}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, way], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    kept, pages = run.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="an allocator of glibc")
def test_pages_are_fetched_once() -> None:
    (plain, each_time), (kept, once) = faults("plain"), faults("keep")
    assert (plain, kept) == (False, True)
    assert once * 4 < each_time


@pytest.mark.skipif(sys.platform != "linux", reason="variables of glibc")
def test_a_setting_of_the_environment_has_its_way() -> None:
    kept, _ = faults("keep", MALLOC_TOP_PAD_="131072")
    assert not kept
