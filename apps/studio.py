"""What all pages share: the workspace of a visitor, the queue of jobs, and the painter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from veneer.injection import VeneerError

from .job_queue import JobQueue
from .jobs import Job, make
from .limits import LIMITS
from .painter import Painter
from .workspace import Workspace

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Studio:
    """The app's parts.

    Args:
        root: of the workspaces of all users.
    """

    root: Path
    queue: JobQueue
    painter: Painter

    @staticmethod
    def at(root: Path, device: str | None = None) -> Studio:
        """A studio over a folder, which is made."""
        root.mkdir(parents=True, exist_ok=True)
        return Studio(root, JobQueue(root), Painter(device))

    def workspace(self, request: gr.Request | None) -> Workspace:
        """The files of who asks: by login, or everybody's where there is none."""
        return Workspace(self.root, getattr(request, "username", None))

    def begin(self, workspace: Workspace, kind: str, title: str, words: list[str]) -> Job:
        """A new job of a visitor, which waits for its turn.

        Raises:
            VeneerError: too many of them wait already.
        """
        if workspace.waiting() >= LIMITS.jobs:
            raise VeneerError(f"{LIMITS.jobs} of your jobs wait or run already. Wait for one to end, or stop one.")
        return make(workspace.jobs, kind, title, words)


def explained(function: F) -> F:
    """A handler whose refusals are shown on the page, as plain text, and not as a stack of calls."""

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except (VeneerError, ValueError, OSError) as error:
            raise gr.Error(escaped(str(error)), duration=None, print_exception=False) from error

    return run  # type: ignore[return-value]


def escaped(text: str) -> str:
    """Text that shows as itself where a page reads HTML or Markdown.

    >>> escaped("<b>*a*</b>")
    '&lt;b&gt;&#42;a&#42;&lt;/b&gt;'
    """
    found = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    for mark in "*_`[]#|!\\~$":
        found = found.replace(mark, f"&#{ord(mark)};") if mark != "#" else found
    return found
