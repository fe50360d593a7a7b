"""A look at a run before it starts, by the command's own check in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from veneer.injection import VeneerError

from ...limits import LIMITS
from ...workspace import Workspace
from ..personalize.request import Asked, words
from .photo_upload import Rows, lay_down

COMMAND = (sys.executable, "-c", "from veneer_command import console; console()")


def checked(workspace: Workspace, paths: Sequence[str] | None, captions: Rows, asked: Asked) -> str:
    """What `veneer personalize --dry-run` says of the photos, of memory and time by a step that it tries, and its concerns.

    Raises:
        VeneerError: what the run would refuse, or the check takes longer than `LIMITS.check_seconds`.
    """
    words(asked, workspace.given)  # refuse before anything is written
    folder = lay_down(workspace, paths or [], captions)
    with tempfile.TemporaryDirectory() as out:
        told = [*COMMAND, *words(asked, folder), "--dry-run", f"--out={Path(out) / 'run'}"]
        try:
            done = subprocess.run(told, capture_output=True, text=True, timeout=LIMITS.check_seconds, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise VeneerError(
                f"the check took more than {LIMITS.check_seconds} seconds; start the run to see how it goes.",
                where="check_seconds",
                expected=LIMITS.check_seconds,
            ) from error
        finally:
            shutil.rmtree(folder)
    said = done.stdout[done.stdout.find("\nphotos:") + 1 :].strip()
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.startswith(("veneer: ", "- "))]
        message = "\n".join(why).removeprefix("veneer: ").replace(f"{folder}/", "")
        raise VeneerError(message or "the check failed without a word.", where="check", given=tuple(message.splitlines()))
    return said
