"""Services that all pages share: workspaces, the job queue, the image generator, and errors shown on the page."""

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

from .generator import Generator
from .job_queue import JobQueue
from .jobs import Job, create_job
from .quotas import ImageCounter, Quotas
from .workspace import Workspace, printable

LOG = logging.getLogger("veneer.app")
HTML_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Context:
    """Services of one running app.

    Args:
        root: folder that contains the workspaces of all users. `quotas`: of each login. `images`: counts generated images.
    """

    root: Path
    queue: JobQueue
    generator: Generator
    quotas: Quotas
    images: ImageCounter

    @staticmethod
    def create(root: Path, device: str | None = None, quotas: Quotas | None = None) -> Context:
        """Creates the root folder, readable by its owner only, and the services over it."""
        root = root.absolute()  # a relative path of a missing file would have the form of a hub name
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        quotas = quotas or Quotas()
        return Context(root, JobQueue(root), Generator(device), quotas, ImageCounter(quotas.images_per_hour))

    def workspace(self, request: gr.Request | None) -> Workspace:
        """Workspace of the logged-in user, or the shared one if the app runs without logins."""
        user = getattr(request, "username", None)
        return Workspace(self.root, user, None if user is None else self.quotas.stored_bytes)

    def submit(self, workspace: Workspace, kind: str, title: str, command: list[str]) -> Job:
        """Creates a job and puts it into the queue.

        Raises:
            VeneerError: the user already has the maximum number of unfinished jobs.
        """
        workspace.check_queue()
        return create_job(workspace.jobs, kind, title, command)


def show_errors(function: F) -> F:
    """Wraps an event handler or generator so that expected errors appear on the page as plain text, without a traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _as_page_errors():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def run_generator(*args: Any, **kwargs: Any) -> Any:
        with _as_page_errors():
            yield from function(*args, **kwargs)

    return run_generator if inspect.isgeneratorfunction(function) else run  # type: ignore[return-value]


@contextlib.contextmanager
def _as_page_errors() -> Iterator[None]:
    try:
        yield
    except (VeneerError, ValueError, OSError) as error:
        raise page_error(str(error)) from error


def page_error(reason: str) -> gr.Error:
    """Error to raise in a handler: plain text on the page, one line in the server log."""
    LOG.warning("refused: %s", printable(reason, 300))
    return gr.Error(escape_markup(reason), duration=None, print_exception=False)


def escape_markup(text: str) -> str:
    """Escapes text for HTML and Markdown: every ASCII punctuation character and leading whitespace becomes an entity.

    >>> escaped("<b>*a*</b>")
    '&lt;b&gt;&#42;a&#42;&lt;&#47;b&gt;'
    """
    escaped = re.sub(r"(?m)^[ \t]+|[!-/:-@\[-`{-~]", lambda match: "".join(map(_entity, match.group())), text)
    return escaped.replace("\0", "\ufffd")


def _entity(character: str) -> str:
    return HTML_ENTITIES.get(character) or f"&#{ord(character)};"
