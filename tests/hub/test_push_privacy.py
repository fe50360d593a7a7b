"""What `veneer push` does not upload: photos, local paths, and files outside the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from veneer.pipelines.push import PushConfig, push

from tests.raising import raises
from veneer.injection.errors import VeneerError
from veneer.publishing import read_run
from veneer.publishing.adapter_metadata import public_provenance

from .repositories import card
from .runs import SECRET, on_hub, personalization
from .server import Hub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # of the hub's client with httpx
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # of diffusers
]


def test_nothing_of_this_machine_is_uploaded(
    hub: Hub, run: Path, controlled: Path, classified: Path, local_base: str, tmp_path: Path
) -> None:
    """Neither photos, nor files that show them, nor names of local folders, also if the base model is a local one."""
    second = Path(shutil.copytree(run, tmp_path / "second"))
    on_hub(second, local_base)
    for number, folder in enumerate([run, second, controlled, classified]):
        out = tmp_path / f"out{number}"
        push(PushConfig(folder, "user/toy", dry_run=True, out=out))
        names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert not {name.rpartition("/")[2] for name in names} & {
            "before_after.png", "maps.png", "sheet.png", "mistakes.png", "result.json", "config.toml", "splits.json",
        }  # fmt: skip
        for name in names:
            assert SECRET.encode() not in (out / name).read_bytes(), name
        assert "license" not in card(out).data.to_dict(), "none was passed"
        assert "has set no license" in card(out).text
        assert card(out).data.to_dict().get("base_model") == ("owner/tiny" if folder == run else None)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("../a.png", "a file in the folder of the run"),
        ("samples/../../a.png", "a file in the folder of the run"),
        ("{parent}/a.png", "a file in the folder of the run"),
        ("..\\a.png", "a file in the folder of the run"),
        ("samples/link.png", "a file in the folder of the run"),
        ("links/a.png", "a file in the folder of the run"),
        ("config.toml", ".png"),
        (None, ".png"),
    ],
)
def test_samples_outside_the_run_are_rejected(run: Path, tmp_path: Path, file: str | None, expected: str) -> None:
    (tmp_path / "a.png").write_bytes(b"private")
    (run / "samples/link.png").symlink_to(tmp_path / "a.png")
    (run / "links").symlink_to(tmp_path)
    file = file and file.replace("{parent}", str(tmp_path))
    record = json.loads((run / "result.json").read_text())
    record["samples"].append({"file": file, "prompt": "a"})
    (run / "result.json").write_text(json.dumps(record))
    with raises(VeneerError, where="samples", given=file, file=run, expected=expected):
        push(PushConfig(run, "user/toy", dry_run=True, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "samples/grid.png"])
def test_links_out_of_the_run_are_rejected(run: Path, tmp_path: Path, name: str) -> None:
    (run / name).rename(tmp_path / "moved")
    (run / name).symlink_to(tmp_path / "moved")
    with raises(VeneerError, where="files", given=name, file=run):
        push(PushConfig(run, "user/toy", dry_run=True, out=tmp_path / "out"))


def test_links_inside_the_run_are_followed(run: Path, tmp_path: Path) -> None:
    (run / "samples/00.png").rename(run / "samples/first.png")
    (run / "samples/00.png").symlink_to("first.png")
    link = tmp_path / "link"
    link.symlink_to(run)
    push(PushConfig(link, "user/toy", dry_run=True, out=tmp_path / "out"))
    assert (tmp_path / "out/samples/00.png").read_bytes() == (run / "samples/first.png").read_bytes()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"base": "bundled", "data": "digits"}, {"base": "bundled", "data": "digits"}),
        ({"base": "owner/model", "base_source": "hub"}, {"base": "owner/model", "base_source": "hub"}),
        ({"base": "models/my-sdxl", "data": "photos/of-my-kids", "condition": "canny"}, {"condition": "canny"}),
        ({"base": "models/my-sdxl", "base_source": "local"}, {"base_source": "local"}),
        ({"model": "models/vit", "data": "digits"}, {"model": "vit", "data": "digits"}),
        ({"base": "/home/me/model", "data": "/home/me/photos", "concept": "toy"}, {"concept": "toy"}),
        ({"base": "models", "extracted": "~/tuned", "photos": 3}, {"photos": 3}),
        ({"base": r"C:\models\sd", "data": "me/photos/pets"}, {}),
    ],
)
def test_provenance_without_paths(given: dict[str, Any], kept: dict[str, Any]) -> None:
    assert public_provenance(given) == kept


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("/home/me/secret/ink.safetensors", "ink.safetensors"),
        ("secret/ink.safetensors", "ink.safetensors"),
        (r"C:\secret\ink.safetensors", "ink.safetensors"),
        ("secret/runs/ink", "ink"),
        ("/cache/models--user--ink/snapshots/0a1b/lora/ink.safetensors", "user/ink/lora/ink.safetensors"),
    ],
)
def test_fixed_adapters_keep_their_file_name_and_digest(file: str, kept: str) -> None:
    record = {"file": file, "scale": 0.8, "sha256": "ab"}
    assert public_provenance({"with": [record]}) == {"with": [{"file": kept, "scale": 0.8, "sha256": "ab"}]}


def test_names_in_the_cache_of_the_hub_are_public(hub: Hub, base: dict[str, bytes]) -> None:
    """Files of runs that recorded no source of their base model."""
    hub.add("owner/tiny", base)
    assert public_provenance({"base": "owner/tiny"}) == {}
    snapshot_download("owner/tiny")
    assert public_provenance({"base": "owner/tiny", "data": "owner/tiny"}) == {"base": "owner/tiny"}
    assert public_provenance({"base": "owner/tiny", "base_source": "local"}) == {"base_source": "local"}


def test_local_base_of_two_parts_is_not_named_as_a_hub_model(
    hub: Hub, local_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if `push` runs in another folder, and the hub's cache has a model of that name."""
    shutil.copytree(local_base, tmp_path / "models/my-sdxl")
    monkeypatch.chdir(tmp_path)
    folder = personalization(tmp_path, "models/my-sdxl", eval="none").resolve()
    assert read_run(folder).provenance["base"] == str(tmp_path / "models/my-sdxl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    hub.add("models/my-sdxl", {"config.json": b"{}"})
    for number in range(2):
        out = tmp_path / f"out{number}"
        push(PushConfig(folder, "user/toy", dry_run=True, out=out))
        assert "base_model" not in card(out).data.to_dict()
        assert all(b"models/my-sdxl" not in path.read_bytes() for path in out.rglob("*") if path.is_file())
        snapshot_download("models/my-sdxl")


def test_base_of_the_hub_is_recorded(hub: Hub, base: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("owner/tiny", base)
    folder = personalization(tmp_path, "owner/tiny", eval="none")
    assert read_run(folder).hub_base == "owner/tiny"
    assert read_run(folder).provenance["base_source"] == "hub"
