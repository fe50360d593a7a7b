"""Quotas of a login, and the eviction of the cache."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from veneer.apps.cache_eviction import CacheEviction, evict, paths_in_use
from veneer.apps.context import Context
from veneer.apps.job_queue import JobQueue
from veneer.apps.jobs import create_job
from veneer.apps.pages.adapters import files
from veneer.apps.pages.generate import generation
from veneer.apps.pages.shared.generation_request import parse_request
from veneer.apps.pages.shared.job_view import delete_job
from veneer.apps.quotas import GIB, ImageCounter, QuotaError, Quotas, stored_bytes
from veneer.apps.request_limits import LimitsMiddleware, RequestError
from veneer.apps.server import AppConfig
from veneer.apps.workspace import Workspace

from tests.raising import raises
from veneer.injection import OptionError, StateError


def sized(path: Path, size: int, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def login(name: str) -> Any:
    return SimpleNamespace(username=name)


def test_images_per_hour() -> None:
    now = [0.0]
    counter = ImageCounter(10, lambda: now[0])
    counter.take("ann", 6)
    now[0] = 600.0
    counter.take("ann", 4)
    with raises(QuotaError, quota="images_per_hour", given=11, expected=10, seconds=3000.0):
        counter.take("ann", 1)
    counter.take("bob", 10)
    now[0] = 3600.0
    counter.take("ann", 6)
    with raises(QuotaError, given=11, seconds=600.0):
        counter.take("ann", 1)
    with raises(QuotaError, given=21, expected=10):
        counter.take("bob", 11)
    for _ in range(3):
        counter.take(None, 10)


def test_generated_images_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the base model is loaded, and with the images of a comparison."""
    context = Context.create(tmp_path, quotas=Quotas(images_per_hour=5))
    form = parse_request("bundled", "an apple", "", 0, 2, 1, 64, 64, 3)
    first = generation.generate(context, context.workspace(login("ann")), form, [], [], "with")
    assert next(first) == ([], "0 of 3")
    second = generation.generate(context, context.workspace(login("ann")), form, [], [], "with")
    with raises(QuotaError, quota="images_per_hour", given=6, expected=5):
        next(second)
    for _ in range(2):
        assert next(generation.generate(context, context.workspace(None), form, [], [], "with"))[1] == "0 of 3"


def test_stored_bytes_are_limited(tmp_path: Path) -> None:
    context = Context.create(tmp_path, quotas=Quotas(stored_bytes=1000))
    workspace, other = context.workspace(login("ann")), context.workspace(login("bob"))
    sized(workspace.adapters / "a.safetensors", 600)
    sized(tmp_path / "cache" / "uploads" / workspace.folder.name / "x" / "photo.png", 300)
    assert stored_bytes(workspace.folder) == 600
    workspace.check_storage(100)
    with raises(QuotaError, quota="stored_bytes", given=1001, expected=1000):
        workspace.check_storage(101)
    other.check_storage(1000)
    sized(workspace.datasets / "b.png", 101)
    with raises(QuotaError, quota="stored_bytes", given=1001):
        context.submit(workspace, "train", "a toy", [])
    assert not workspace.all_jobs()
    with raises(QuotaError, quota="stored_bytes", given=1002):
        files.store_upload(workspace, sized(tmp_path / "new.safetensors", 1))
    context.submit(context.workspace(None), "train", "a toy", [])


def test_uploads_count_toward_the_stored_bytes(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "ann", 1000)
    (tmp_path / "cache").mkdir()
    sized(workspace.adapters / "a.safetensors", 900)
    guard = LimitsMiddleware(lambda *given: None, files=tmp_path / "cache", stored=1000)  # type: ignore[arg-type, return-value]

    def upload(size: int, user: str) -> None:
        app = SimpleNamespace(cookie_id="", tokens={user: user})
        headers = [(b"content-length", str(size).encode()), (b"cookie", f"access-token-={user}".encode())]
        scope = {"type": "http", "path": "/gradio_api/upload", "method": "POST", "app": app, "headers": headers}
        asyncio.run(guard._check(scope, None))  # type: ignore[arg-type]

    upload(100, "ann")
    upload(1000, "bob")
    with pytest.raises(RequestError) as caught:
        upload(101, "ann")
    assert caught.value.status == 413


@pytest.mark.parametrize("name", ["images_per_hour", "storage"])
def test_quotas_are_flags(name: str) -> None:
    assert AppConfig(images_per_hour=7, storage=2).quotas() == Quotas(7, 2 * GIB)
    with raises(OptionError, option=name, given=0, expected=1):
        AppConfig(**{name: 0})


def test_files_of_unfinished_jobs_are_kept(tmp_path: Path) -> None:
    """An adapter that a waiting run trains from is not deleted."""
    workspace = Workspace(tmp_path)
    own = sized(workspace.adapters / "a.safetensors", 1)
    trained = create_job(workspace.jobs, "train", "a toy", [])
    sized(trained.run / "result.json", 2)
    words = ["personalize", f"--init-from={own}", "--with", f"{trained.run}/adapter.safetensors:0.5"]
    job = create_job(workspace.jobs, "train", "a toy", words)
    with raises(StateError, given=job.name):
        files.delete(workspace, "a")
    with raises(StateError, given=job.name):
        delete_job(workspace, trained.name)
    job.stop()
    files.delete(workspace, "a")
    delete_job(workspace, trained.name)
    assert not own.exists()
    assert not trained.folder.exists()


def test_oldest_files_are_evicted_first(tmp_path: Path) -> None:
    a, b = tmp_path / "cache", tmp_path / "temporary"
    old, middle = sized(a / "1" / "old.png", 40, 3000), sized(b / "2" / "middle.png", 40, 2000)
    new, recent = sized(a / "3" / "new.png", 40, 1000), sized(a / "recent.png", 40, 10)
    assert evict([a, b], 160) == []
    assert evict([a, b], 120) == [old]
    assert evict([a, b], 79) == [middle, new], "a recent file stays"
    assert recent.exists()
    assert not (a / "3" / "new.png").exists()


def test_eviction_keeps_files_of_unfinished_jobs(tmp_path: Path) -> None:
    cache, queue = tmp_path / "cache", JobQueue(tmp_path)
    workspace = Workspace(tmp_path)
    used = sized(cache / "used" / "a.png", 40, 4000)
    named = sized(cache / "b.safetensors", 40, 4000)
    ended, free = sized(cache / "ended" / "c.png", 40, 4000), sized(cache / "free.png", 40, 3000)
    create_job(workspace.jobs, "train", "a toy", ["personalize", str(used.parent), "--with", f"{named}:0.5"])
    stopped = create_job(workspace.jobs, "train", "a toy", ["personalize", str(ended.parent)])
    (stopped.folder / "stop").touch()
    thread = CacheEviction([cache], 0, lambda: paths_in_use(queue), seconds=0.01)
    thread.start()
    end = time.monotonic() + 60
    while (ended.exists() or free.exists()) and time.monotonic() < end:
        time.sleep(0.02)
    thread.close()
    assert not ended.exists()
    assert not free.exists()
    assert used.exists()
    assert named.exists()
