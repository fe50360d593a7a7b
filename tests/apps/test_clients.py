"""Concurrent clients over HTTP: during training, twenty at once, beyond the queue limit, and disconnected ones."""

from __future__ import annotations

import io
import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from veneer.apps import jobs
from veneer.apps.limits import LIMITS
from veneer.apps.server import FILE_LIFETIME, _cache

from tests.apps.browser import PATIENCE, App, served
from tests.apps.clients import STEPS, Client, Visit, adapters, memory, round_of, wishes
from tests.methods.controls import picture
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.report.png_metadata import read_settings

CLIENTS = 20
PROMPT = "a dog, center, white background"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """A server with separate folders for its files."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "tmp"))
        with served(folder) as found:
            adapters(found)
            yield found


@pytest.fixture(scope="module")
def names(app: App) -> list[str]:
    return sorted(path.stem for path in (app.workspace / "local" / "adapters").glob("*.safetensors"))


def image(visit: Visit) -> Image.Image:
    """A request of a user."""
    assert (visit.refused, visit.error) == (None, None)
    [content] = visit.pictures.values()
    return Image.open(io.BytesIO(content))


def test_concurrent_clients_get_their_own_images(app: App, names: list[str], tmp_path: Path) -> None:
    """Each client is told its queue position."""
    asked = wishes(0, CLIENTS, names)
    visits = round_of(app, asked)
    seen = set()
    for visit, (prompt, seed, side, chosen) in zip(visits, asked, strict=True):
        found = image(visit)
        assert found.size == (side, side)
        seen.add(np.asarray(found).tobytes())
        file = tmp_path / f"{seed}.png"
        file.write_bytes(*visit.pictures.values())
        told = read_settings(file)
        assert (told["prompt"], told["seed"]) == (prompt, seed)
        assert [each["file"] for each in told["adapters"]] == chosen
        kinds = [message["msg"] for message in visit.messages if message["msg"] != "heartbeat"]
        assert kinds[0] == "estimation", "a place before anything else"
        assert kinds[-1] == "process_completed"
        assert "process_generating" in kinds, "how far it is"
        assert visit.places == sorted(visit.places, reverse=True), "nobody overtakes"
    assert len(seen) == CLIENTS, "no two are alike"
    assert max(visit.places[0] for visit in visits) >= CLIENTS // 2, "they did wait for one another"
    files = [path for path in (app.workspace / "cache").rglob("*.png") if path.is_file()]
    assert len(files) <= len(seen) + 1, "one file for each picture, and the page's own icon"


def test_generation_during_training(app: App, tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    for seed in range(2):
        picture(seed).save(tmp_path / "photos" / f"{seed}.png")
    words = ["personalize", str(tmp_path / "photos"), "--base", str(tmp_path / "base"), "--concept", "<toy>"]
    words += ["--method", "lora", "--eval-seeds", "0", "--tracker", "none", "--steps", "100000"]
    job = jobs.create_job(app.workspace / "local" / "jobs", "train", "a toy", words)
    until(lambda: job.progress(), job)
    reached = job.progress()[-1].step
    with Client(app.address) as client:
        client.open()
        visit = client.draw(PROMPT, 3, 64)
    assert image(visit).size == (64, 64)
    until(lambda: job.progress()[-1].step > reached, job)
    assert job.state == "running"
    job.stop()
    until(lambda: job.state == "stopped", job)


def until(true: Callable[[], object], job: jobs.Job) -> None:
    """Waits for a job state, which may be passed between two checks."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert job.state in ("waiting", "running") or true(), job.log()
        assert time.monotonic() < end, job.log()
        time.sleep(0.1)


def test_full_queue_rejects_and_disconnect_frees_a_place(app: App) -> None:
    with Client(app.address) as long, Client(app.address) as many, Client(app.address) as late:
        slow = {"generate-prompt": PROMPT, STEPS: 60, "generate-count": LIMITS.images}
        assert long.join("generate-draw", **slow) is None
        drawing = long.told()
        assert any(message["msg"] == "process_generating" for message in drawing), "its turn has come"
        for _ in range(LIMITS.waiting):
            assert many.join("generate-draw", **slow) is None
        refused = late.join("generate-draw", **slow)
        assert refused is not None
        assert f"Queue is full. Max size is {LIMITS.waiting}" in refused, "for which the page says that it is busy"
        waiting = many.told()
        places = [message["rank"] for message in itertools.islice(waiting, LIMITS.waiting)]
        assert places == list(range(LIMITS.waiting))
        waiting.close()  # type: ignore[attr-defined]
        drawing.close()  # type: ignore[attr-defined]
        begun, visit = time.monotonic(), Visit(refused="not asked yet")
        while visit.refused and time.monotonic() < begun + PATIENCE:  # until the server sees that they are gone
            visit = late.draw(PROMPT, 1, 64)
            time.sleep(0.05)
    assert image(visit).size == (64, 64)
    assert visit.places[0] == 0, "of all who were before, nobody waits"


def test_memory_does_not_grow(app: App, names: list[str]) -> None:
    """After a warm-up round, further rounds of users who open a page, generate and leave do not increase memory.

    The server remembers the last `LIMITS.sessions` pages, about 1 MiB each, so these are opened before. Allocators still grow in
    the first round, by up to 20 MiB; afterwards memory varied by 15 MiB over twelve rounds. Without a limit on pages each round
    takes 20 to 30 MiB: two rounds are more than the limit of the test.
    """
    with Client(app.address) as client:
        for _ in range(LIMITS.sessions - CLIENTS):
            client.session = secrets.token_hex(6)
            client.open()
    seen = []
    for turn in range(1, 5):
        assert all(visit.pictures for visit in round_of(app, wishes(turn, CLIENTS, names)))
        seen.append(memory(app))
    assert seen[-1] - seen[1] < 30, seen
    assert threading.active_count() < CLIENTS


def test_expired_cache_files_are_deleted_on_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    for name, age in (("old", FILE_LIFETIME + 60), ("young", FILE_LIFETIME - 60)):
        file = tmp_path / "cache" / name / "a.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"a")
        os.utime(file, (time.time() - age,) * 2)
    assert [path.parent.name for path in _cache(tmp_path).rglob("*.png")] == ["young"]
