"""What all pages share: the workspace of a visitor, the queue of jobs, and the painter."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from veneer.injection import VeneerError

from .generator import Painter
from .job_queue import JobQueue
from .jobs import Job, make
from .workspace import Workspace, shown

LOG = logging.getLogger("veneer.app")
NAMED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
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
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Studio(root, JobQueue(root), Painter(device))

    def workspace(self, request: gr.Request | None) -> Workspace:
        """The files of who asks: by login, or everybody's where there is none."""
        return Workspace(self.root, getattr(request, "username", None))

    def begin(self, workspace: Workspace, kind: str, title: str, words: list[str]) -> Job:
        """A new job of a visitor, which waits for its turn.

        Raises:
            VeneerError: too many of them wait already.
        """
        workspace.check_room()
        return make(workspace.jobs, kind, title, words)


def explained(function: F) -> F:
    """A handler, or a generator, whose refusals are shown on the page, as plain text, and not as a stack of calls."""

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        with _refusals():
            return function(*given, **named)

    @functools.wraps(function)
    def run_on(*given: Any, **named: Any) -> Any:
        with _refusals():
            yield from function(*given, **named)

    return run_on if inspect.isgeneratorfunction(function) else run  # type: ignore[return-value]


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (VeneerError, ValueError, OSError) as error:
        raise refusal(str(error)) from error


def refusal(why: str) -> gr.Error:
    """An error to raise: plain text on the page, one line in the server's log."""
    LOG.warning("refused: %s", shown(why, 300))
    return gr.Error(escaped(why), duration=None, print_exception=False)


def escaped(text: str) -> str:
    """Text that shows as itself where a page reads HTML or Markdown: all that either may read as a mark is an entity.

    >>> escaped("<b>*a*</b>")
    '&lt;b&gt;&#42;a&#42;&lt;&#47;b&gt;'
    """
    marked = re.sub(r"(?m)^[ \t]+|[!-/:-@\[-`{-~]", lambda found: "".join(map(_entity, found.group())), text)
    return marked.replace("\0", "\ufffd")


def _entity(mark: str) -> str:
    return NAMED.get(mark) or f"&#{ord(mark)};"
