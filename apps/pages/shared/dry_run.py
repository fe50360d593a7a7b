"""Check of a run before it starts: `veneer personalize --dry-run` in a subprocess."""

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
from ..personalize.concept_groups import save_groups
from ..personalize.request import PersonalizeRequest, command
from .photo_upload import Rows

COMMAND = (sys.executable, "-c", "from veneer_command import console; console()")


def dry_run(workspace: Workspace, paths: Sequence[str] | None, captions: Rows, request: PersonalizeRequest) -> str:
    """Report of `veneer personalize --dry-run`: photos, memory and time measured in one training step, and warnings.

    Raises:
        VeneerError: the run would fail, or the check takes longer than `LIMITS.check_seconds`.
    """
    command(request, workspace.datasets)  # validates before anything is written
    folders = save_groups(workspace, paths or [], captions, request.groups)
    with tempfile.TemporaryDirectory() as out:
        command_line = [*COMMAND, *command(request, folders[0], folders[1:]), "--dry-run", f"--out={Path(out) / 'run'}"]
        try:
            done = subprocess.run(
                command_line, capture_output=True, text=True, timeout=LIMITS.check_seconds, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise VeneerError(
                f"the check took more than {LIMITS.check_seconds} seconds; start the run instead.",
                where="check_seconds",
                expected=LIMITS.check_seconds,
            ) from error
        finally:
            for folder in folders:
                shutil.rmtree(folder)
    report = done.stdout[done.stdout.find("\nphotos:") + 1 :].strip()
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("veneer: ", "- "))]
        message = "\n".join(lines).removeprefix("veneer: ").replace(f"{folders[0]}/", "")
        raise VeneerError(message or "the check failed without a message.", where="check", given=tuple(message.splitlines()))
    return report
