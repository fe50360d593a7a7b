"""The app's server as whoever reaches it may use it: what is served, what is bounded, and who comes in."""

from __future__ import annotations

import gc
import http.client
import io
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.routes import App
from PIL import Image
from veneer.apps.context import Context
from veneer.apps.limits import LIMITS
from veneer.apps.request_limits import LimitsMiddleware, RequestError
from veneer.apps.server import AppConfig, _cache, _is_loopback, app, build, read_logins
from veneer.apps.workspace import Workspace

from tests.apps.browser import Small
from tests.apps.small_server import SMALL
from tests.raising import raises
from veneer.injection.errors import OptionError

LOGIN = "anna:correct horse"


class Served(Small):
    """A client of the small server."""

    def __init__(self, root: Path, login: str | None = None) -> None:
        super().__init__(root, login)
        self.files = root / "cache"
        self.client = httpx.Client(base_url=self.address, timeout=60, limits=httpx.Limits(keepalive_expiry=1))

    def upload(self, **files: bytes) -> httpx.Response:
        given = [("files", (name, data)) for name, data in files.items()]
        return self.client.post("/gradio_api/upload", files=given)

    def join(self, index: int, data: list[Any], session: str) -> httpx.Response:
        given = {"fn_index": index, "data": data, "session_hash": session, "event_data": None, "trigger_id": None}
        return self.client.post("/gradio_api/queue/join", json=given)

    def answer(self, session: str) -> dict[str, Any]:
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                told: dict[str, Any] = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if told.get("msg") == "process_completed":
                    return told
        raise AssertionError("no answer")

    def left(self) -> list[Path]:
        return [path for path in self.files.rglob("*") if path.is_file()]

    def close(self) -> None:
        self.client.close()
        super().close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("open"))
    yield found
    found.close()


def test_only_the_cache_is_served(served: Served) -> None:
    secret = Workspace(served.root).jobs / "1" / "job.json"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    there = served.upload(**{"a.png": b"\x89PNG"}).json()[0]
    assert Path(there).is_relative_to(served.files / "uploads")
    made = served.files / "made" / "image.png"  # by the server, as it keeps what handlers give
    made.parent.mkdir()
    made.write_bytes(b"\x89PNG")
    assert served.client.get(f"/gradio_api/file={made}").status_code == 200
    assert served.client.get(f"/gradio_api/file={there}").status_code == 200
    for path in (
        secret, f"{served.files}/../local/jobs/1/job.json", "/etc/passwd", "../../../etc/passwd", "pyproject.toml", "file:///etc/passwd",
        "//etc/passwd", Path("README.md").resolve(), f"{served.files}%2f..%2flocal%2fjobs%2f1%2fjob.json", served.root,
    ):  # fmt: skip
        for way in ("file=", "file/", "proxy=", "custom_component/", "file=http://127.0.0.1/"):
            answer = served.client.get(f"/gradio_api/{way}{path}")
            assert answer.status_code in (400, 403, 404, 422), (way, path, answer.text[:100])
            assert "secret" not in answer.text
            assert "root:" not in answer.text


def test_uploaded_html_is_served_as_a_download(served: Served) -> None:
    for name in ("a.html", "a.svg", "a.xhtml", "a.js"):
        there = served.upload(**{name: b"<script>alert(1)</script>"}).json()[0]
        headers = served.client.get(f"/gradio_api/file={there}").headers
        assert headers["content-disposition"].startswith("attachment")
        assert headers["content-type"] == "application/octet-stream"
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]


def test_uploads_are_limited_and_leave_no_partial_files(served: Served) -> None:
    before = served.left()
    assert served.upload(**{"a.png": b"x" * 200_001}).status_code == 413, "one file"
    many = served.upload(**{f"{n}.png": bytes([n]) * 60_000 for n in range(5)})
    assert many.status_code == 413, "several at once"
    assert "200,000 bytes" in many.text
    assert served.upload(**{f"{n}.png": b"x" for n in range(1001)}).status_code == 400, "in number"
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + b"y" * 500_000
    unclaimed = served.client.post(
        "/gradio_api/upload", content=iter([body[:100_000]] * 9), headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert unclaimed.status_code in (400, 413)
    connection = http.client.HTTPConnection("127.0.0.1", int(served.address.rsplit(":", 1)[1]))
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("content-type", "multipart/form-data; boundary=b")
    connection.putheader("content-length", "150000")
    connection.endheaders(body[:100_000])
    time.sleep(0.5)
    connection.close()
    end = time.monotonic() + 20
    while served.left() != before and time.monotonic() < end:
        time.sleep(0.1)
    assert served.left() == before
    assert served.upload(**{"../../x/../out.png": b"x" * 1000}).json()[0].startswith(str(served.files))


def test_uploads_leave_disk_space_free(served: Served) -> None:
    guard = LimitsMiddleware(lambda *given: None, files=served.files, limits=replace(SMALL, disk_free=2**60))  # type: ignore[arg-type, return-value]
    with raises(RequestError, status=507):
        guard._check_disk(0)


def test_requests_are_limited(served: Served) -> None:
    assert served.join(0, ["x" * 30_000], "big").status_code == 413
    assert (
        served.client.post(
            "/gradio_api/queue/join", content="[" * 15_000, headers={"content-type": "application/json"}
        ).status_code
        == 400
    )
    for data in (
        [{"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}],
        [[{"a": {"path": "HTTPS://a.b/c"}}]],
    ):
        answer = served.join(1, data, "elsewhere")
        assert (answer.status_code, "does not download files" in answer.text) == (403, True)
    assert served.client.post("/gradio_api/process_recording", files={"video": b"x"}).status_code == 403


def test_only_the_queue_endpoint_is_open(served: Served) -> None:
    for way in ("/gradio_api/run/slow", "/gradio_api/api/slow", "/gradio_api/run/look"):
        assert served.client.post(way, json={"data": ["x"]}).status_code == 404
    assert served.client.post("/gradio_api/run/predict", json={"data": ["x"], "fn_index": 0}).status_code == 404


def test_queue_is_limited(served: Served) -> None:
    (served.root / "turn").unlink(missing_ok=True)
    answers = [served.join(0, [str(n)], f"s{n}") for n in range(12)]
    full = [answer for answer in answers if answer.status_code == 503]
    assert full
    assert "Queue is full" in full[0].text
    (served.root / "turn").touch()
    for n, answer in enumerate(answers):
        if answer.status_code == 200:
            assert served.answer(f"s{n}")["output"]["data"] == [str(n)]


def test_invalid_image_gives_a_clear_error(served: Served) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (30, 20)).save(whole, "PNG")
    given = {"a.png": b"<b>text</b>", "b.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "c.png": whole.getvalue()}
    said = []
    for n, there in enumerate(served.upload(**given).json()):
        data = {"path": there, "meta": {"_type": "gradio.FileData"}, "orig_name": Path(there).name}
        assert served.join(1, [data], f"p{n}").status_code == 200
        said.append(served.answer(f"p{n}"))
    assert [told["success"] for told in said] == [False, False, True]
    assert said[0]["output"]["error"].startswith("a&#46;png&#58; text")
    assert "an SVG drawing" in said[1]["output"]["error"]
    assert said[2]["output"]["data"] == ["(30, 20)"]
    outside = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    served.join(1, [outside], "outside")
    assert served.answer("outside")["success"] is False


def test_other_origins_and_hosts_are_rejected(served: Served) -> None:
    """Cross-site requests and DNS rebinding."""
    port = served.address.rsplit(":", 1)[1]
    assert served.client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert served.client.get("/", headers={"host": f"127.0.0.1.evil.example:{port}"}).status_code == 403
    assert served.client.get("/", headers={"host": f"localhost:{port}"}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        answer = served.client.post("/gradio_api/upload", files={"files": b"x"}, headers={"origin": origin})
        assert answer.status_code == 403
    assert served.client.get("/config", headers={"origin": served.address}).status_code == 200


@pytest.fixture
def environment() -> Iterator[None]:
    """Restores what `install_limits` changes for the process."""
    pixels, given, drawn = Image.MAX_IMAGE_PIXELS, gr.Image.preprocess, gr.ImageEditor.accept_blobs
    numbers = gr.Number.preprocess, gr.Slider.preprocess
    yield
    Image.MAX_IMAGE_PIXELS = pixels
    gr.Image.preprocess, gr.ImageEditor.accept_blobs = given, drawn  # type: ignore[method-assign]
    gr.Number.preprocess, gr.Slider.preprocess = numbers  # type: ignore[method-assign]
    if "uploaded_file_dir" in vars(App):
        del App.uploaded_file_dir


def test_login_protects_the_app(tmp_path: Path) -> None:
    found = Served(tmp_path, LOGIN)
    try:
        for way in ("/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd"):
            assert found.client.get(way).status_code == 401
        assert found.upload(**{"a.png": b"x"}).status_code == 401
        assert found.join(0, ["x"], "s").status_code == 401
        assert found.client.post("/gradio_api/component_server", json={}).status_code == 401
        assert found.left() == []
        tries = [found.client.post("/login", data={"username": "anna", "password": f"guess {n}"}).status_code for n in range(6)]
        assert tries == [400] * 5 + [429]
    finally:
        found.close()


def test_logins_are_parsed(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_text("\ufeffanna:12345678\r\n\n bob : with:colon:s \n", encoding="utf-8")
    assert read_logins((str(file), "c:87654321")) == [("anna", "12345678"), ("bob", " with:colon:s"), ("c", "87654321")]
    assert read_logins(()) == []
    for wrong in ("anna", "anna:short", ":12345678", "x" * 5000, "anna\0:1"):
        with raises(OptionError, option="auth", expected="NAME:PASSWORD"):
            read_logins((wrong,))
    with raises(OptionError, option="auth", expected="NAME:PASSWORD", given=None) as caught:
        read_logins(("my secret password",))
    assert "secret" not in str(caught.value), "what was meant as a password is not printed"
    with raises(OptionError, option="auth", given="anna"):
        read_logins(("anna:12345678", "anna:87654321"))
    file.write_bytes(b"\xff\xfe\x00\x80")
    with raises(OptionError, option="auth", file=file, given="unreadable"):
        read_logins((str(file),))


def test_hosts_that_need_a_login(tmp_path: Path) -> None:
    own = {"127.0.0.1": True, "localhost": True, "::1": True, "127.1.2.3": True}
    other = [
        "0.0.0.0",
        "::",
        "192.168.0.2",
        "example.org",
        "",
        "127.0.0.1.example.org",
        "localhost.example.org",
        "2130706433",
        "[::1]x",
    ]
    for host, mine in {**own, **dict.fromkeys(other, False)}.items():
        assert _is_loopback(host) is mine, host
        if not mine:
            with raises(OptionError, option="auth", where="host"):
                app(AppConfig(host=host, workspace=tmp_path / "none"))
    with raises(OptionError, option="auth", where="share"):
        app(AppConfig(share=True, workspace=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_expired_files_are_deleted_on_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    root = Context.create(tmp_path / "root").root
    assert root.stat().st_mode & 0o077 == 0
    folder = _cache(root)
    for name, age in (("old", 25), ("new", 23)):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(b"x")
        os.utime(folder / name / "a.png", times=(time.time() - age * 3600,) * 2)
    _cache(root)
    assert [path.parent.name for path in folder.rglob("*.png")] == ["new"]


def test_app_builds_with_limits(environment: None, tmp_path: Path) -> None:
    page = build(Context.create(tmp_path))
    assert page._queue.max_size == LIMITS.waiting
    assert not page.api_open
    assert LIMITS.photo_pixels == Image.MAX_IMAGE_PIXELS
    ids = [block.elem_id for block in page.blocks.values() if block.elem_id]
    assert len(set(ids)) == len(ids), [each for each in ids if ids.count(each) > 1]
    del page
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Gradio lets go of event loops that it has not closed
        gc.collect()
