"""Values and files of requests that no page sends: whose they are, and what the server says of them."""

from __future__ import annotations

import html
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.apps.test_server import LOGIN, Served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    yield found
    found.close()


def test_uploads_belong_to_a_login(tmp_path: Path) -> None:
    found = Served(tmp_path, f"{LOGIN},bob:battery staple")
    try:
        sent = io.BytesIO()
        Image.new("RGB", (64, 64)).save(sent, "PNG")
        found.client.post("/login", data=dict(zip(("username", "password"), LOGIN.split(":"), strict=True)))
        there = found.upload(**{"a.png": sent.getvalue()}).json()[0]
        assert found.client.get(f"/gradio_api/file={there}").status_code == 200
        value = {"path": there, "meta": {"_type": "gradio.FileData"}}
        assert found.join(1, [value], "anna").status_code == 200
        assert found.answer("anna")["success"]
        with httpx.Client(base_url=found.address, timeout=60, limits=httpx.Limits(keepalive_expiry=1)) as bob:
            anna, found.client = found.client, bob
            assert bob.post("/login", data={"username": "bob", "password": "battery staple"}).status_code == 200
            away = f"{Path(there).parent}/../{Path(there).parent.name}/a.png"
            for path in (there, away, f"/{there}", os.path.relpath(there)):
                for way in ("file=", "file/"):
                    assert bob.get(f"/gradio_api/{way}{path}").status_code in (403, 404), path
                assert found.join(1, [{**value, "path": path}], "bob").status_code == 403
                body = json.dumps({"fn_index": 1, "data": [{**value, "path": path}], "session_hash": "bob"})
                assert bob.post("/gradio_api/queue/join", content=body).status_code == 403, "without a content type"
            own = found.upload(**{"a.png": sent.getvalue()}).json()[0]
            assert own != there
            assert bob.get(f"/gradio_api/file={own}").status_code == 200
            found.client = anna
    finally:
        found.close()


def test_a_wrong_value_names_its_field_in_one_line(served: Served) -> None:
    """The server's log has the message and no traceback."""
    before = len((served.root / "server.txt").read_text())
    wrong: list[tuple[int, Any, str]] = [
        (3, "abc", "Steps is abc; expected a whole number from 1 to 9"), (3, 2.5, "Steps is 2.5"), (3, 10, "Steps is 10"),
        (3, [1], "Steps is"), (3, True, "Steps is True"), (3, 1e308, "Steps is"),
        (1, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "Picture"), (1, "abc", "Picture"),
    ]  # fmt: skip
    for number, (index, value, words) in enumerate(wrong):
        assert served.join(index, [value], f"wrong{number}").status_code == 200
        told = served.answer(f"wrong{number}")
        assert not told["success"]
        assert words in html.unescape(html.unescape(told["output"]["error"])), value
    served.join(3, [3.0], "right")
    assert served.answer("right")["output"]["data"] == ["3"]
    log = (served.root / "server.txt").read_text()[before:]
    assert "Traceback" not in log
    assert len([line for line in log.splitlines() if line.startswith("refused: ")]) == len(wrong)
