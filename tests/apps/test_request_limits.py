"""The guard before an app that takes whatever comes: what reaches it, and what is refused before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from veneer.apps import request_limits as module
from veneer.apps.limits import LIMITS
from veneer.apps.request_limits import MARGIN, LimitsMiddleware, RequestError

from tests.raising import raises

SMALL = replace(LIMITS, request_bytes=1000, sketch_bytes=5000, file_bytes=10_000, disk_free=1)
JOIN, DRAWN, UPLOAD = (f"/gradio_api/{way}" for way in ("queue/join", "component_server", "upload"))


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that echoes the request body."""
    await Response(await Request(scope, receive).body())(scope, receive, send)


def ask(method: str, path: str, files: Path | None = None, **more: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(LimitsMiddleware(app, {"localhost"}, files, SMALL))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **more)

    return asyncio.run(asked())


async def pieces(count: int) -> AsyncIterator[bytes]:
    """A request body without a content length."""
    for _ in range(count):
        yield b"x" * 100


@pytest.mark.parametrize(
    "way",
    [
        "proxy=http://a.example/", "process_recording", "vibe-edit", "undo-vibe-edit", "deep_link", "runs", "run-history",
        "file=http://a.example/x.png", "file=HTTPS://a.example/x.png", "file/http://a.example/x.png",
    ],
)  # fmt: skip
def test_unused_endpoints_are_disabled(way: str) -> None:
    for method in ("GET", "POST"):
        assert ask(method, f"/gradio_api/{way}").status_code == 403
    assert ask("GET", "/gradio_api/file=/tmp/http.png").status_code == 200


def test_bodies_are_limited_regardless_of_content_length() -> None:
    assert ask("POST", JOIN, content=b"x" * 1000).content == b"x" * 1000
    assert ask("POST", JOIN, content=b"x" * 1001).status_code == 413
    assert ask("POST", JOIN, content=pieces(10)).content == b"x" * 1000
    assert ask("POST", JOIN, content=pieces(11)).status_code == 413
    assert ask("POST", DRAWN, content=b"x" * 5000).status_code == 200, "a drawing may be larger"
    assert ask("POST", DRAWN, content=b"x" * (5001 + MARGIN)).status_code == 413


def test_uploads_are_counted_while_streaming(tmp_path: Path) -> None:
    assert ask("POST", UPLOAD, tmp_path, content=pieces(100)).status_code == 200
    assert ask("POST", UPLOAD, tmp_path, content=b"x" * (10_001 + MARGIN)).status_code == 413
    with pytest.raises(MultiPartException, match="10,000"):
        ask("POST", UPLOAD, tmp_path, content=pieces(101 + MARGIN // 100))


def test_upload_that_would_fill_the_disk_is_rejected_first(tmp_path: Path) -> None:
    claimed = {"content-length": str(2**60)}
    assert ask("POST", UPLOAD, tmp_path, headers=claimed, content=pieces(1)).status_code == 507


def test_login_attempts_reset_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[-1]))
    guard = LimitsMiddleware(app, limits=replace(SMALL, logins=2))
    for now, let_in in ((0, True), (10, True), (20, False), (59, False), (61, True), (71, True), (120, False), (122, True)):
        clock.append(now)
        if let_in:
            guard._check_logins()
        else:
            with raises(RequestError, status=429):
                guard._check_logins()


@pytest.mark.parametrize(("way", "status"), [("/", 200), ("/gradio_api/runs", 403)])
def test_every_response_has_security_headers(way: str, status: int) -> None:
    answer = ask("GET", way)
    assert answer.status_code == status
    assert answer.headers["referrer-policy"] == "no-referrer"
    told = [directive.split() for directive in answer.headers["content-security-policy"].split(";")]
    assert {"default-src", "object-src", "base-uri", "form-action", "frame-ancestors"} <= {name for name, *_ in told}
    here = {"'self'", "'none'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}
    assert all(set(sources) <= here for _, *sources in told), "no other host, and no scheme of the network"
