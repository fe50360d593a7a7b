"""A local hub: its server, the settings of the hub's client that point to it, and finished runs to upload."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api, snapshot_download

from .runs import SECRET, base_files, classification, control_run, on_hub, personalization
from .server import TOKEN, Hub, serve

SETTINGS = ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running server; the client of this process uses it, with an empty cache and without a token."""
    home = tmp_path / "home"
    with serve() as state:
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        _point_to(state.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield state


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """An access token that can write to the repositories of `user`."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def disconnect(monkeypatch: pytest.MonkeyPatch) -> str:
    """Points the client to a closed port; returns the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    _point_to(address, monkeypatch)
    return address


def _point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", address)  # of the client's functions, which diffusers calls


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Environment of a command that uses the server."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**kept, "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a small pipeline."""
    return base_files(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def local_base(base: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small pipeline in a local folder."""
    folder = tmp_path_factory.mktemp("local") / SECRET / "base"
    for name, content in base.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.fixture(scope="session")
def finished(local_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of pivotal tuning."""
    return on_hub(personalization(tmp_path_factory.mktemp("finished"), local_base, method="pivotal"))


@pytest.fixture(scope="session")
def controlled(local_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a ControlNet on a local base model."""
    return control_run(tmp_path_factory.mktemp("control"), local_base)


@pytest.fixture(scope="session")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a classifier."""
    return classification(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def run(hub: Hub, base: dict[str, bytes], finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose base model is on the hub and in the cache."""
    hub.add("owner/tiny", base)
    snapshot_download("owner/tiny")
    return Path(shutil.copytree(finished, tmp_path / "run"))
