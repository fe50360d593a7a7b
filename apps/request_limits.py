"""What stands before Gradio and bounds what it does not: the size of requests, who may ask, and what leaves for elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartException
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import LIMITS, Limits
from .workspace import ALONE, Workspace

API = "/gradio_api/"
UPLOAD = API + "upload"
CLOSED = (
    API + "proxy=",
    API + "process_recording",
    API + "vibe",
    API + "undo-vibe",
    API + "deep_link",
    API + "runs",
    API + "run-history",
)
"""Gradio's ways that this app has no use for, which ask other hosts or run other programs."""
HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Of every answer: whatever a page shows, the browser asks no other host for it."""
MARGIN = 2**16
"""Bytes around the content of an upload."""
UPLOADS = "uploads"
"""Folder in the cache with a folder of uploads for each login."""
OWNER: ContextVar[str] = ContextVar("owner", default=ALONE)
"""Name of the folder of the visitor who asks."""
PLACE: ContextVar[str] = ContextVar("place", default="")
"""Folder in the cache into which this request uploads; empty for the cache itself, from which Gradio serves."""


class Refused(Exception):
    """An answer instead of Gradio's."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Guard:
    """Middleware.

    Args:
        hosts: names by which this machine may be called, where there is no login; None for any. A page of another origin, or a
            name that leads here though it is another's, is refused: its owner could otherwise use the browser of who runs this.
        files: the cache, in which the uploads of a login are served to that login only; its disk is left with
            `limits.disk_free` bytes.
    """

    def __init__(
        self, app: ASGIApp, hosts: Iterable[str] | None = None, files: Path | None = None, limits: Limits = LIMITS
    ) -> None:
        self.app, self.files, self.limits = app, files, limits
        self.hosts = None if hosts is None else frozenset(hosts)
        self._logins: deque[float] = deque(maxlen=limits.logins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            marked = _marked(send)
            OWNER.set(Workspace(Path(), _user(scope)).folder.name)
            PLACE.set(f"{UPLOADS}/{OWNER.get()}" if scope["path"].startswith(UPLOAD) else "")
            try:
                given = await self._passed(scope, receive)
            except Refused as refused:
                await PlainTextResponse(refused.why, refused.status, headers={"connection": "close"})(scope, receive, marked)
            else:
                await self.app(scope, given, marked)
        else:
            await send({"type": "websocket.close"})

    async def _passed(self, scope: Scope, receive: Receive) -> Receive:
        """What the app receives.

        Raises:
            Refused: it receives nothing.
        """
        headers, path = Headers(scope=scope), scope["path"]
        self._check_origin(headers)
        if path.startswith(CLOSED) or path.lower().startswith((API + "file=http", API + "file/http")):
            raise Refused(403, "This app has no such way.")
        for kind in ("file=", "file/"):
            if path.startswith(API + kind):
                self._check_owner(path.removeprefix(API + kind))
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return receive
        if path.rstrip("/") == "/login":
            self._check_logins()
        claimed = int(headers.get("content-length", "0")) if headers.get("content-length", "0").isdecimal() else 0
        if path.startswith(UPLOAD):
            self._check_disk(claimed)
            return _counted(receive, claimed, self.limits.file_bytes + MARGIN)
        drawing = path.startswith(API + "component_server")
        body = await _read(receive, claimed, self.limits.drawing_bytes + MARGIN if drawing else self.limits.request_bytes)
        for file in _files_of(body, headers.get("content-type")):
            self._check_owner(file)
        return _again(body, receive)

    def _check_origin(self, headers: Headers) -> None:
        if self.hosts is None:
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name(host) not in self.hosts:
            raise Refused(403, f"This app is called by {', '.join(sorted(self.hosts))} only, unless it is started with --auth.")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "A page from elsewhere may not use this app.")

    def _check_owner(self, file: str) -> None:
        """Uploads of another login are neither served nor used."""
        if self.files is None or not file:
            return
        try:
            parts = Path(os.path.realpath(file)).relative_to(os.path.realpath(self.files / UPLOADS)).parts
        except ValueError:  # no upload, or no path
            return
        if parts[:1] != (OWNER.get(),):
            raise Refused(403, "This file was uploaded by another user. Upload your own copy.")

    def _check_logins(self) -> None:
        now = time.monotonic()
        if len(self._logins) == self._logins.maxlen and now - self._logins[0] < 60:
            raise Refused(429, "Too many tries to log in. Wait a minute.")
        self._logins.append(now)

    def _check_disk(self, claimed: int) -> None:
        if self.files is not None and shutil.disk_usage(self.files).free - claimed < self.limits.disk_free:
            raise Refused(507, "The disk of this app is nearly full. Delete jobs, or ask who runs it.")


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _marked(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return sent


def _counted(receive: Receive, claimed: int, most: int) -> Receive:
    """An upload of which no more than so many bytes come; what has come of another is deleted by the parser."""
    why = f"Files of more than the maximum allowed size of {most - MARGIN:,} bytes at once. Send fewer or smaller ones."
    if claimed > most:
        raise Refused(413, why)
    came = 0

    async def received() -> Message:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        if came > most:
            raise MultiPartException(why)
        if message["type"] == "http.disconnect":
            raise MultiPartException("The upload was broken off.")
        return message

    return received


async def _read(receive: Receive, claimed: int, most: int) -> bytes:
    body = bytearray()
    more = claimed <= most
    while more and len(body) <= most:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if claimed > most or len(body) > most:
        raise Refused(413, f"A request of more than {most:,} bytes. Send less at once.")
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once, and then whatever comes, such as that the visitor has left."""
    given = False

    async def received() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return received


def _user(scope: Scope) -> str | None:
    """The login of a request, as Gradio finds it; None for nobody."""
    app = scope.get("app")
    names = [f"access-token-{kind}{getattr(app, 'cookie_id', '')}" for kind in ("", "unsecure-")]
    cookies = cookie_parser(Headers(scope=scope).get("cookie", ""))
    token = next((cookies[name] for name in names if cookies.get(name)), None)
    user: str | None = getattr(app, "tokens", {}).get(token)
    return user


def _files_of(body: bytes, kind: str | None) -> list[str]:
    """Paths of files in a request of JSON. A body without a type is tried, since frameworks read it as JSON.

    Raises:
        Refused: not the JSON that its type says, or a file that the server would fetch from elsewhere itself.
    """
    if not body or (kind is not None and "json" not in kind.lower()):
        return []
    try:
        rest: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        if kind is None:
            return []
        raise Refused(400, "The request is no JSON.") from None
    found = []
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            path = str(value.get("path", ""))
            if path.lower().startswith(("http:", "https:")):
                raise Refused(403, "This app fetches no files from elsewhere. Save the file, and bring it.")
            found.append(path)
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return found
