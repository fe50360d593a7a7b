"""Hub names: a short error without delay if the hub is unreachable, or the local cache if it has the files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.raising import raises
from veneer import base_models
from veneer.hub.connection import hub, unreachable
from veneer.testing.pipelines import tiny_pipeline


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Sets the hub's endpoint to a closed port, and an empty cache."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listening: connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield address


def test_unreachable_hub_uses_the_cache_only(closed: str) -> None:
    assert closed in unreachable()
    with hub() as why:
        assert closed in why
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()
    with hub(required=False) as why:
        assert not why
        assert not constants.is_offline_mode()


def test_any_http_response_means_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with hub() as why:
            assert not why
            assert not constants.is_offline_mode()
        server.shutdown()


def test_cached_base_loads_without_the_hub(closed: str, tmp_path: Path) -> None:
    commit, folder = "0" * 40, tmp_path / "cache" / "models--owner--tiny"
    tiny_pipeline("sd").save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert type(base_models.load("owner/tiny")).__name__ == "StableDiffusionPipeline"
    with raises(base_models.BaseModelError, where="hub", given="owner/other") as caught:
        base_models.load("owner/other")
    assert closed in str(caught.value)


def test_unreachable_hub_error_is_one_line(closed: str, tmp_path: Path) -> None:
    """Of timm's and of diffusers' models, in one process. The hub's client alone would log each of its retries."""
    commands = {"resnet18": "transfer digits --model resnet18 --out run", "owner/none": "generate x --base owner/none"}
    start = "import sys; from veneer.cli import main; print(*(main(words.split()) for words in sys.argv[1:]))"
    settings = {**os.environ, "HF_ENDPOINT": closed, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", start, *commands.values()]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1 1\n")
    errors = [line for line in done.stderr.strip().splitlines() if not line.endswith("…")]  # which are the phases
    assert len(errors) == len(commands), "no retries"
    for name, error in zip(commands, errors, strict=True):
        assert name in error
        assert closed in error
