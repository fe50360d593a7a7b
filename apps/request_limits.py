"""Middleware before Gradio: limits on request sizes and logins, origin checks, file ownership and security headers."""

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
from .quotas import QuotaError
from .workspace import LOCAL_USER, UPLOADS, Workspace

API = "/gradio_api/"
UPLOAD = API + "upload"
DISABLED_ENDPOINTS = (
    API + "proxy=",
    API + "process_recording",
    API + "vibe",
    API + "undo-vibe",
    API + "deep_link",
    API + "runs",
    API + "run-history",
)
"""Gradio endpoints that this app does not use; they contact other hosts or run other programs."""
HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Added to every response: the browser loads nothing from other hosts."""
MARGIN = 2**16
"""Bytes of multipart overhead allowed in an upload."""
OWNER: ContextVar[str] = ContextVar("owner", default=LOCAL_USER)
"""Workspace folder name of the user of the current request."""
UPLOAD_FOLDER: ContextVar[str] = ContextVar("place", default="")
"""Folder in the cache for uploads of the current request; empty for other requests."""


class RequestError(Exception):
    """Rejects a request with an HTTP status and a message."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.why = status, reason


class LimitsMiddleware:
    """ASGI middleware that checks requests before Gradio handles them.

    Args:
        hosts: accepted values of the Host header for an app without logins; None accepts any. Rejecting other hosts and
            origins prevents DNS rebinding and cross-site requests.
        files: the cache; uploads are served to the login that made them only, and must leave `limits.disk_free` bytes free.
        stored: quota of stored bytes of each login (default: none).
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str] | None = None,
        files: Path | None = None,
        limits: Limits = LIMITS,
        stored: int | None = None,
    ) -> None:
        self.app, self.files, self.limits, self.stored = app, files, limits, stored
        self.hosts = None if hosts is None else frozenset(hosts)
        self._logins: deque[float] = deque(maxlen=limits.logins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            send_with_headers = _marked(send)
            OWNER.set(Workspace(Path(), _user(scope)).folder.name)
            UPLOAD_FOLDER.set(f"{UPLOADS}/{OWNER.get()}" if scope["path"].startswith(UPLOAD) else "")
            try:
                given = await self._check(scope, receive)
            except RequestError as error:
                await PlainTextResponse(error.why, error.status, headers={"connection": "close"})(
                    scope, receive, send_with_headers
                )
            else:
                await self.app(scope, given, send_with_headers)
        else:
            await send({"type": "websocket.close"})

    async def _check(self, scope: Scope, receive: Receive) -> Receive:
        """Checks a request and returns the `receive` callable for the app.

        Raises:
            RequestError: the request is rejected.
        """
        headers, path = Headers(scope=scope), scope["path"]
        self._check_origin(headers)
        if path.startswith(DISABLED_ENDPOINTS) or path.lower().startswith((API + "file=http", API + "file/http")):
            raise RequestError(403, "This endpoint is disabled.")
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
            self._check_quota(scope, claimed)
            return _limit_upload(receive, claimed, self.limits.file_bytes + MARGIN)
        drawing = path.startswith(API + "component_server")
        body = await _read(receive, claimed, self.limits.sketch_bytes + MARGIN if drawing else self.limits.request_bytes)
        for file in _files_of(body, headers.get("content-type")):
            self._check_owner(file)
        return _replay(body, receive)

    def _check_origin(self, headers: Headers) -> None:
        if self.hosts is None:
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        if _hostname(host) not in self.hosts:
            raise RequestError(403, f"Without --auth, this app accepts requests to {', '.join(sorted(self.hosts))} only.")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RequestError(403, "Requests from pages of other origins are rejected.")

    def _check_owner(self, file: str) -> None:
        """Rejects access to uploads of another login."""
        if self.files is None or not file:
            return
        try:
            parts = Path(os.path.realpath(file)).relative_to(os.path.realpath(self.files / UPLOADS)).parts
        except ValueError:  # not an upload, or not a path
            return
        if parts[:1] != (OWNER.get(),):
            raise RequestError(403, "This file was uploaded by another user. Upload your own copy.")

    def _check_logins(self) -> None:
        now = time.monotonic()
        if len(self._logins) == self._logins.maxlen and now - self._logins[0] < 60:
            raise RequestError(429, "Too many login attempts. Wait a minute.")
        self._logins.append(now)

    def _check_disk(self, claimed: int) -> None:
        if self.files is not None and shutil.disk_usage(self.files).free - claimed < self.limits.disk_free:
            raise RequestError(507, "The disk of the server is nearly full. Delete jobs, or ask the administrator.")

    def _check_quota(self, scope: Scope, claimed: int) -> None:
        """Rejects an upload beyond the quota of its login."""
        user = _user(scope)
        if self.files is None or self.stored is None or user is None:
            return
        try:
            Workspace(self.files.parent, user, self.stored).check_storage(claimed)
        except QuotaError as error:
            raise RequestError(413, str(error)) from error


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _marked(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_with_headers


def _limit_upload(receive: Receive, claimed: int, limit: int) -> Receive:
    """Limits the size of an upload; the multipart parser deletes a partial upload."""
    reason = f"The upload exceeds the maximum allowed size of {limit - MARGIN:,} bytes. Send fewer or smaller files."
    if claimed > limit:
        raise RequestError(413, reason)
    received_bytes = 0

    async def received() -> Message:
        nonlocal received_bytes
        message = await receive()
        received_bytes += len(message.get("body", b""))
        if received_bytes > limit:
            raise MultiPartException(reason)
        if message["type"] == "http.disconnect":
            raise MultiPartException("The upload was interrupted.")
        return message

    return received


async def _read(receive: Receive, claimed: int, limit: int) -> bytes:
    body = bytearray()
    more = claimed <= limit
    while more and len(body) <= limit:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if claimed > limit or len(body) > limit:
        raise RequestError(413, f"The request exceeds {limit:,} bytes. Send less at once.")
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Replays the body once, then passes on later messages such as a disconnect."""
    sent = False

    async def received() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return received


def _user(scope: Scope) -> str | None:
    """Login of a request, found as Gradio does; None without a login."""
    app = scope.get("app")
    names = [f"access-token-{kind}{getattr(app, 'cookie_id', '')}" for kind in ("", "unsecure-")]
    cookies = cookie_parser(Headers(scope=scope).get("cookie", ""))
    token = next((cookies[name] for name in names if cookies.get(name)), None)
    user: str | None = getattr(app, "tokens", {}).get(token)
    return user


def _files_of(body: bytes, kind: str | None) -> list[str]:
    """File paths in a JSON request. A body without a content type is parsed as well, since frameworks accept it as JSON.

    Raises:
        RequestError: invalid JSON, or a URL that the server would download.
    """
    if not body or (kind is not None and "json" not in kind.lower()):
        return []
    try:
        pending: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        if kind is None:
            return []
        raise RequestError(400, "The request is not valid JSON.") from None
    paths = []
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            path = str(value.get("path", ""))
            if path.lower().startswith(("http:", "https:")):
                raise RequestError(403, "This app does not download files from URLs. Save the file and upload it.")
            paths.append(path)
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return paths
