"""HTTP clients of the app's queue, and a load test.

`python -m tests.apps.clients --clients 20 --rounds 10` starts a server and prints a table of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

import veneer
from tests.apps.adapters import perturbed
from tests.apps.browser import PATIENCE, App, served
from veneer.formats import native

API = "/gradio_api"
SIDES = (32, 64, 96)
"""Image sizes in `wishes`, in pixels."""
METHODS = ("lora", "ia3", "dora", "textual_inversion")
"""Methods of the adapters created by `adapters`."""
STEPS, WIDTH, HEIGHT = "Steps", "Width in pixels", "Height in pixels"


@dataclass
class Visit:
    """Result of one press of a button.

    Args:
        messages: of the queue, in their order. `refused`: why it was not let in.
        pictures: names in the server's cache and contents. `seconds`: from the press to the last message.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None
    pictures: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def places(self) -> list[int]:
        """Reported queue positions, in order."""
        return [told["rank"] for told in self.messages if told["msg"] == "estimation"]

    @property
    def error(self) -> str | None:
        """Error of the event, if any."""
        ends = [told for told in self.messages if told["msg"] in ("process_completed", "unexpected_error")]
        if ends and ends[-1].get("success"):
            return None
        return str((ends[-1].get("output") or ends[-1]) if ends else "the server said no end")


class Client:
    """A client of the app without a browser: components, a session, and the two streams of a page.

    Args:
        address: of the app, such as `http://127.0.0.1:7860`.
    """

    def __init__(self, address: str) -> None:
        self.session = secrets.token_hex(6)
        origin, limits = {"origin": address}, httpx.Limits(keepalive_expiry=1)  # the server closes them after 5 idle seconds
        self.http = httpx.Client(base_url=address, headers=origin, timeout=PATIENCE, limits=limits, trust_env=False)
        self.config = self.http.get("/config").raise_for_status().json()
        self.parts = {part["id"]: part["props"] for part in self.config["components"]}
        self.changed: dict[int, Any] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    @contextlib.contextmanager
    def alive(self) -> Iterator[Client]:
        """Keeps the heartbeat connection of the page open."""
        with self.http.stream("GET", f"{API}/heartbeat/{self.session}") as beat:
            assert beat.is_success
            yield self

    def event(self, name: str, target: str = "click") -> dict[str, Any]:
        """Event that a component triggers."""
        [part] = [number for number, props in self.parts.items() if props.get("elem_id") == name]
        [found] = [event for event in self.config["dependencies"] if [part, target] in event["targets"]]
        return dict(found)

    def data(self, event: Mapping[str, Any], changed: Mapping[str, Any]) -> list[Any]:
        """Inputs of an event as on the page, except for changed ones, by element ID or label."""
        rest, data = dict(changed), []
        for number in event["inputs"]:
            props = self.parts[number]
            name = next((name for name in (props.get("elem_id"), props.get("label")) if name in rest), None)
            data.append(self.changed.get(number, props.get("value")) if name is None else rest.pop(name))
        assert not rest, f"no such inputs: {rest}"
        return data

    def open(self) -> None:
        """Runs the load events of the page that bypass the queue, such as filling lists."""
        for event in self.config["dependencies"]:
            if [0, "load"] in event["targets"] and not event["queue"]:
                sent = {"fn_index": event["id"], "data": self.data(event, {}), "session_hash": self.session}
                answer = self.http.post(f"{API}/run/predict", json=sent).raise_for_status().json()
                for number, value in zip(event["outputs"], answer["data"], strict=True):
                    updated = isinstance(value, dict) and value.get("__type__") == "update"
                    if not updated or "value" in value:
                        self.changed[number] = value["value"] if updated else value

    def join(self, name: str, **changed: Any) -> str | None:
        """Presses a button; returns the reason if the queue rejects it."""
        event = self.event(name)
        sent = {"fn_index": event["id"], "data": self.data(event, changed), "session_hash": self.session}
        answer = self.http.post(f"{API}/queue/join", json=sent | {"trigger_id": event["targets"][0][0], "event_data": None})
        if answer.status_code == 503:
            return str(answer.json()["detail"])
        assert answer.is_success, answer.text
        return None

    def told(self) -> Iterator[dict[str, Any]]:
        """Messages of the queue until the end of the stream."""
        with self.http.stream("GET", f"{API}/queue/data", params={"session_hash": self.session}) as answer:
            assert answer.is_success, answer.status_code
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line.removeprefix("data:"))
                    if message["msg"] == "close_stream":
                        return
                    yield message

    def press(self, name: str, **changed: Any) -> Visit:
        """Presses a button, waits for the end, and downloads the images."""
        begun, visit = time.monotonic(), Visit()
        visit.refused = self.join(name, **changed)
        if visit.refused is None:
            visit.messages = list(self.told())
        visit.seconds = time.monotonic() - begun
        if visit.refused is None and visit.error is None:
            for shown in visit.messages[-1]["output"]["data"][0]:
                path = shown["image"]["path"]
                visit.pictures[path] = self.http.get(f"{API}/file={path}").raise_for_status().content
        return visit

    def draw(self, prompt: str, seed: int, side: int, names: Sequence[str] = (), steps: int = 2) -> Visit:
        """Generates an image on the page Generate."""
        generation = {"generate-prompt": prompt, "generate-seed": seed, STEPS: steps, WIDTH: side, HEIGHT: side}
        return self.press("generate-draw", **generation, **{"generate-adapters": list(names)})


def adapters(app: App) -> list[str]:
    """Creates one adapter of each of several methods."""
    folder = app.workspace / "local" / "adapters"
    folder.mkdir(parents=True)
    pipe = veneer.base_models.load("bundled")
    for method in METHODS:
        options = {"tokens": "<toy>", "initialize": "cat"} if method == "textual_inversion" else {}
        attached = perturbed(pipe, method, 0.1, **options)
        native.save(attached, folder / f"{method}.safetensors", provenance={"concept": "<toy>", "class_word": "toy"})
        attached.detach()
    return list(METHODS)


def wishes(turn: int, clients: int, names: Sequence[str]) -> list[tuple[str, int, int, list[str]]]:
    """A different prompt, seed, size and selection of adapters for each client of a round."""
    things = veneer.base_models.preset("bundled").things
    found = []
    for number in range(clients):
        seed = turn * clients + number
        chosen = [name for bit, name in enumerate(names) if seed >> bit & 1]
        found.append((f"a {things[seed % len(things)]}, center, white background", seed, SIDES[seed % len(SIDES)], chosen))
    return found


def round_of(app: App, asked: Sequence[tuple[str, int, int, list[str]]]) -> list[Visit]:
    """All clients open a page and generate at once; then all pages are closed."""
    with contextlib.ExitStack() as pages, ThreadPoolExecutor(len(asked)) as threads:
        opened = [pages.enter_context(Client(app.address)) for _ in asked]
        for client in opened:
            client.open()
            pages.enter_context(client.alive())
        return list(threads.map(lambda client, generation: client.draw(*generation), opened, asked))


def memory(app: App) -> float:
    """Memory of the server process in MiB, without its jobs."""
    assert app.process is not None
    return float(psutil.Process(app.process.pid).memory_info().rss / 2**20)


def measure(clients: int, rounds: int) -> None:
    """Prints a line for each round."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "app") as app:
        names = adapters(app)
        print(f"{'round':>5} {'seconds':>8} {'pictures':>8} {'median wait':>12} {'longest wait':>12} {'RSS in MiB':>10}")
        print(f"{'-':>5} {'-':>8} {'-':>8} {'-':>12} {'-':>12} {memory(app):10.1f}", flush=True)
        for turn in range(rounds):
            begun = time.monotonic()
            visits = round_of(app, wishes(turn, clients, names))
            seconds, waits = time.monotonic() - begun, [visit.seconds for visit in visits]
            count = sum(len(visit.pictures) for visit in visits)
            line = (
                f"{turn + 1:5} {seconds:8.1f} {count:8} {statistics.median(waits):12.1f} {max(waits):12.1f} {memory(app):10.1f}"
            )
            print(line, flush=True)
            for told in {visit.refused or visit.error for visit in visits} - {None}:
                print(f"      {told}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20, help="that draw at once")
    parser.add_argument("--rounds", type=int, default=10, help="of all clients, one after the other")
    given = parser.parse_args()
    measure(given.clients, given.rounds)
