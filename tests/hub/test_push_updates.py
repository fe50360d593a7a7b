"""`veneer push` to a repository that exists: what it replaces and deletes, against a local server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from veneer.pipelines.push import PushConfig, push

from .repositories import uploaded
from .server import Hub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # of the hub's client with httpx
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # of diffusers
]


def test_second_push_updates_and_removes_old_samples(hub: Hub, token: None, run: Path) -> None:
    push(PushConfig(run, "user/toy"))
    record = json.loads((run / "result.json").read_text())
    record["samples"] = record["samples"][:1]
    (run / "result.json").write_text(json.dumps(record))
    uploads = len([request for request in hub.requests if request.startswith("PUT")])
    push(PushConfig(run, "user/toy", license="mit"))
    commits = hub.repositories["user/toy"].commits
    assert len(commits) == 3, "the first one is that of the new repository"
    assert "samples/01.png" in commits[1][1]
    assert "samples/01.png" not in commits[2][1]
    assert commits[2][1]["adapter.safetensors"] == commits[1][1]["adapter.safetensors"]
    assert b"license: mit" in commits[2][1]["README.md"]
    puts = [request for request in hub.requests if request.startswith("PUT")]
    assert len(puts) == uploads + 2, "only the files for ComfyUI, which have the license in their metadata"


def test_second_push_deletes_only_files_of_the_first(hub: Hub, token: None, run: Path) -> None:
    own = {"samples/own.png": b"own", "comfyui/own.json": b"{}", "notes.txt": b""}
    hub.add("user/toy", {**own, "README.md": b"# A repository that veneer did not create\n"})
    push(PushConfig(run, "user/toy"))
    first = uploaded(hub, "user/toy")
    assert own.items() <= first.items()
    assert "learned_embeds.safetensors" in first
    (run / "learned_embeds.safetensors").unlink()
    push(PushConfig(run, "user/toy"))
    second = uploaded(hub, "user/toy")
    assert first.keys() - second.keys() == {"learned_embeds.safetensors"}
    assert own.items() <= second.items()


@pytest.mark.parametrize(
    "metadata",
    [
        "veneer_files: ['*', '[a-z]*', '.gitattributes', samples/, 3]", "veneer_files: samples/own.png", "veneer_files: {a: b}",
        "a: [", "- a",
    ],
)  # fmt: skip
def test_invalid_lists_of_files_delete_nothing(hub: Hub, token: None, run: Path, metadata: str) -> None:
    own = {".gitattributes": b"", "samples/own.png": b"own"}
    hub.add("user/toy", {**own, "README.md": f"---\n{metadata}\n---\n".encode()})
    push(PushConfig(run, "user/toy"))
    assert own.items() <= uploaded(hub, "user/toy").items()
