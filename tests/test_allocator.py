"""Freed memory that is kept in the process, and reused by all threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from veneer import cli
from veneer.allocator import USER_SETTINGS

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


THREADS = """
import os, sys, threading
from veneer.allocator import share_freed_memory
shared = sys.argv[1] == "share" and share_freed_memory()
size, kept, turns, over = 100_000, [], threading.Barrier(9), threading.Event()
one = threading.Lock()
def draw():
    with one:
        blocks = [b"x" * size for _ in range(200)]
        kept.append(b"x" * size)  # above the others, so that they cannot be given back
        del blocks
    turns.wait()
    over.wait()
for _ in range(8):
    threading.Thread(target=draw).start()
turns.wait()
resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
over.set()
print(shared, resident)
"""


def resident(way: str, **environment: str) -> tuple[bool, int]:
    """(result of the function, bytes that a process holds after eight threads used 20 MB in turn)."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", THREADS, way], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    shared, held = run.stdout.split()
    return shared == "True", int(held)


def faults(way: str, **environment: str) -> tuple[bool, int]:
    """(result of the function, pages that eight more blocks of 80 MiB requested)."""
    clean = {key: value for key, value in os.environ.items() if key not in USER_SETTINGS}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, way], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    kept, pages = run.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="an allocator of glibc")
def test_pages_are_requested_once() -> None:
    (plain, each_time), (kept, once) = faults("plain"), faults("keep")
    assert (plain, kept) == (False, True)
    assert once * 4 < each_time


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="an allocator of glibc")
def test_threads_reuse_memory_that_others_freed() -> None:
    (plain, each), (shared, together) = resident("plain"), resident("share")
    assert (plain, shared) == (False, True)
    assert each - together > 60e6, "of 160 MB, no more than two heaps' are held"


@pytest.mark.skipif(sys.platform != "linux", reason="variables of glibc")
def test_environment_variables_take_precedence() -> None:
    kept, _ = faults("keep", MALLOC_TOP_PAD_="131072")
    assert not kept
    shared, _ = resident("share", MALLOC_ARENA_MAX="8")
    assert not shared


@pytest.mark.parametrize(("words", "way"), [(["app"], "share"), (["--debug", "app"], "share"), (["methods"], "keep")])
def test_the_app_shares_freed_memory_and_other_commands_keep_it(
    words: list[str], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(sys, "argv", ["veneer", *words, "--help"])
    for name in ("share", "keep"):
        monkeypatch.setattr(cli, f"{name}_freed_memory", lambda name=name: chosen.append(name))
    with pytest.raises(SystemExit):
        cli.console()
    assert chosen == [way]


@pytest.mark.parametrize(
    ("chosen", "told"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_openmp_is_configured_before_torch_is_imported(chosen: dict[str, str], told: str) -> None:
    """By the installed command, which imports torch to inspect a file; environment variables take precedence."""
    code = (
        "import os, sys, veneer_command; print('torch' in sys.modules); sys.argv = ['veneer', 'inspect', 'missing']\n"
        "try: veneer_command.console()\nexcept SystemExit: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    said = subprocess.run([sys.executable, "-c", code], env=unset | chosen, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == "False"
    assert said.splitlines()[-1] == f"{told} True"
