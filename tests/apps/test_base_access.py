"""Base models and adapters that visitors may name, and adapters from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from veneer.apps.base_access import BaseAccess, BaseAccessError, check_access, check_download, install_access
from veneer.apps.context import Context
from veneer.apps.pages.adapters import adapters_page, files
from veneer.apps.pages.control import training
from veneer.apps.pages.control.training import ControlTrainingRequest
from veneer.apps.pages.personalize import personalize_page
from veneer.apps.pages.personalize.config_files import load_config
from veneer.apps.pages.personalize.request import check_base
from veneer.apps.pages.shared.generation_request import defaults, parse_request
from veneer.apps.quotas import QuotaError
from veneer.apps.workspace import Workspace

from tests.apps.adapters import perturbed
from tests.apps.test_personalize_config import request
from tests.hub.conftest import disconnect, hub  # noqa: F401 (a fixture)
from tests.hub.server import Hub
from tests.raising import raises
from veneer import base_models
from veneer.formats import native
from veneer.hub import HubError


@pytest.fixture
def restricted(tmp_path: Path) -> Iterator[Path]:
    """An app that allows the base models of one folder."""
    install_access(BaseAccess((tmp_path / "models",)))
    (tmp_path / "models" / "toy").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    yield tmp_path
    install_access(BaseAccess())


def test_paths_outside_of_the_folders_are_rejected(restricted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same answer whether they exist or not."""
    monkeypatch.chdir(restricted)
    os.symlink(restricted / "secret", restricted / "models" / "link")
    allowed = str(restricted / "models" / "toy")
    assert check_access(allowed) == allowed
    assert [check_access(name) for name in ("bundled", "owner/model", "flux")] == ["bundled", "owner/model", "flux"]
    names = ["secret", "./none", "~/none", "../none", str(restricted / "models" / "link"), f"{allowed}/../../secret"]
    for name in (*names, str(restricted / "secret"), str(restricted / "none"), "models/../secret"):
        with raises(BaseAccessError, where="base", given=name, reason="folder"):
            check_access(name)
    messages = []
    for path in ("secret", "absent"):
        with pytest.raises(BaseAccessError) as caught:
            check_access(str(restricted / path))
        messages.append(str(caught.value).replace(path, ""))
    assert messages[0] == messages[1]
    install_access(BaseAccess())
    assert check_access("secret") == "secret", "an app without logins"


def test_every_page_checks_its_base_model(restricted: Path) -> None:
    secret = str(restricted / "secret")
    context = Context.create(restricted / "app")
    workspace = context.workspace(None)
    (restricted / "run.toml").write_text(f'base = "{secret}"')
    form = ControlTrainingRequest("controlnet", "canny", secret)
    calls: list[Any] = [
        lambda: check_base(secret),
        lambda: load_config(workspace, restricted / "run.toml"),
        lambda: defaults(secret),
        lambda: parse_request(secret, "an apple", "", 0, 2, 1, 64, 64, 3),
        lambda: adapters_page._check_base(secret),
        lambda: training.default_steps("controlnet", secret),
        lambda: training.start_job(context, workspace, form),
    ]
    for call in calls:
        with raises(BaseAccessError, where="base", given=secret):
            call()


def test_a_server_without_the_hub() -> None:
    access = BaseAccess(hub=False)
    with raises(BaseAccessError, where="hub", given="owner/model", reason="hub"):
        access.check("owner/model")
    install_access(access)
    try:
        with raises(BaseAccessError, where="hub", given="owner/model"):
            files.store_download(Workspace(Path("none")), "owner/model")
    finally:
        install_access(BaseAccess())


def test_an_unreachable_hub_is_reported_before_a_run(
    hub: Hub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_download("owner/model")
    disconnect(monkeypatch)
    check_download("bundled")
    context = Context.create(tmp_path)
    paths = personalize_page.show_example("bundled")[0]
    form = request()
    form = type(form)("<toy>", "toy", "owner/model", "lora", form.settings, form.options)
    with raises(HubError, where="hub", given="owner/model") as caught:
        personalize_page.start_job(context, context.workspace(None), paths, [], form)
    assert "\n" not in str(caught.value)
    assert not context.workspace(None).folder.exists()


def test_adapters_of_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    workspace = Workspace(tmp_path / "app")
    made = native.save(perturbed(base_models.load("bundled"), "lora", 0.02), tmp_path / "made.safetensors", {"base": "bundled"})
    hub.add("user/toy", {"lora.safetensors": made.read_bytes()})
    assert files.store_download(workspace, " user/toy ") == "user-toy"
    assert files.store_download(workspace, "user/toy/lora.safetensors") == "user-toy", "the same file"
    assert [*workspace.all_adapters()] == ["user-toy"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "toy").mkdir(parents=True)
    (tmp_path / "user" / "toy" / "adapter.safetensors").write_bytes(b"local")
    assert files.store_download(workspace, "user/toy") == "user-toy", "no local folder of that name"
    for name in ("../made", str(made), "made.safetensors", "user/../made"):
        with raises(HubError, where="name", given=name):
            files.store_download(workspace, name)
    with raises(QuotaError, quota="stored_bytes"):
        files.store_download(Workspace(tmp_path / "app", "ann", 10), "user/toy")
    disconnect(monkeypatch)
    with raises(HubError, where="hub", given="user/other"):
        files.store_download(workspace, "user/other")
