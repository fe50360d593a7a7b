"""Errors of `veneer push`: other folders, tokens and public repositories, against a local server."""

from __future__ import annotations

from pathlib import Path

import pytest
from veneer.pipelines.push import PushConfig, push

from tests.raising import raises
from veneer.hub import HubError
from veneer.injection.errors import OptionError, VeneerError

from .conftest import disconnect
from .repositories import uploaded
from .server import READ_TOKEN, Hub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # of the hub's client with httpx
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # of diffusers
]


def test_unfinished_runs_and_other_folders_are_rejected(tmp_path: Path, token: None) -> None:
    for folder, where, given in ((tmp_path / "none", "run", "missing"), (tmp_path, "result.json", "unfinished")):
        with raises(VeneerError, where=where, given=given, file=folder):
            push(PushConfig(folder, "user/toy"))
    (tmp_path / "result.json").write_text('{"config": {"other": 1}}')
    with raises(VeneerError, given="missing", file=tmp_path):
        push(PushConfig(tmp_path, "user/toy"))
    for repo in ("toy", "user/toy@v2", "user/toy/file.safetensors", "a/b/c"):
        with raises(OptionError, option="repo", given=repo):
            push(PushConfig(tmp_path, repo))


def test_missing_and_refused_tokens(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(hub.repositories)
    with raises(HubError, where="token", given="user/toy", status=None, expected="write access"):
        push(PushConfig(run, "user/toy"))
    for token, status, repo in (("hf_wrong", 401, "user/toy"), (READ_TOKEN, 403, "user/toy"), (READ_TOKEN, 403, "other/toy")):
        monkeypatch.setenv("HF_TOKEN", token)
        with raises(HubError, where="token", given=repo, status=status):
            push(PushConfig(run, repo))
    address = disconnect(monkeypatch)
    with raises(HubError, where="hub", given="user/toy", expected="connection") as caught:
        push(PushConfig(run, "user/toy"))
    assert address in str(caught.value)
    assert len(hub.repositories) == before


def test_private_upload_to_a_public_repository_is_refused(hub: Hub, token: None, run: Path) -> None:
    hub.add("user/open", {"README.md": b""})
    with raises(HubError, where="private", given="user/open", expected="private"):
        push(PushConfig(run, "user/open", private=True))
    assert set(uploaded(hub, "user/open")) == {"README.md"}
