"""Adapters and datasets by their names on the hub, from a local server and from the cache."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from veneer.pipelines.convert import ConvertConfig, convert
from veneer.pipelines.inspect_file import InspectConfig, inspect_file
from veneer.pipelines.merge import MergeConfig, merge
from veneer.pipelines.resize import ResizeConfig, resize

import veneer
from tests.raising import raises
from veneer import formats
from veneer.classification.data.sources import open_source
from veneer.formats import diffusers, local_path, native, peft_folder
from veneer.hub import HubError, RepoName, is_hub_name, parse_name
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.fixed_adapters import parse_adapter

from .conftest import disconnect
from .server import TOKEN, Hub


def trained(pipe: Any, seed: int = 0) -> veneer.Attachment:
    """A LoRA with random weights."""
    attached = veneer.attach(pipe, "lora", rank=2, where="attn.{q,v}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return attached


@pytest.fixture
def lora(tmp_path: Path) -> bytes:
    """A native LoRA file of the small Stable Diffusion."""
    return native.save(trained(tiny_pipeline("sd")), tmp_path / "made.safetensors").read_bytes()


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of an adapter."""
    return formats.read(path).tensors()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/repo", RepoName("user/repo")),
        ("user/repo@v2", RepoName("user/repo", None, "v2")),
        ("user/repo/a.safetensors", RepoName("user/repo", "a.safetensors")),
        ("user/repo/b/a.safetensors@refs/pr/1", RepoName("user/repo", "b/a.safetensors", "refs/pr/1")),
        ("user/repo/a.bin", RepoName("user/repo", "a.bin")),
        ("runs/lora.safetensors", None),
        ("runs/toy/lora", None),
        ("/user/repo", None),
        ("./user/repo", None),
        ("../repo", None),
        ("user/../a.safetensors", None),
        ("~/repo", None),
        ("repo", None),
        ("user/repo@", None),
    ],
)
def test_names_of_the_hub_differ_from_paths(name: str, expected: RepoName | None) -> None:
    assert parse_name(name) == expected
    assert is_hub_name(Path(name)) == (expected is not None or name == "./user/repo")
    assert expected is None or str(expected) == name


def test_load_by_hub_name_has_the_tensors_of_the_file(hub: Hub, lora: bytes, tmp_path: Path) -> None:
    first = hub.add("user/toy", {"lora.safetensors": lora, "README.md": b"# toy"}).commits[0][0]
    other = native.save(trained(tiny_pipeline("sd"), seed=1), tmp_path / "other.safetensors").read_bytes()
    hub.repositories["user/toy"].commit({"lora.safetensors": other})
    for name, content in (("user/toy", other), ("user/toy/lora.safetensors", other), (f"user/toy@{first}", lora)):
        pipe = tiny_pipeline("sd")
        attached = veneer.load(pipe, name)
        expected = veneer.load(tiny_pipeline("sd"), _write(tmp_path / "expected.safetensors", content)).state_dict()
        assert attached.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in attached.state_dict().items())
    attached.swap("user/toy")
    assert attached.loaded is not None


def test_local_files_and_folders_have_precedence(hub: Hub, lora: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("user/toy", {"lora.safetensors": b"another"})
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "user" / "toy" / "adapter.safetensors", lora)
    assert local_path("user/toy") == Path("user/toy")
    veneer.load(tiny_pipeline("sd"), "user/toy")
    assert hub.requests == []


def test_default_file_names_and_configs_beside(hub: Hub, lora: bytes, tmp_path: Path) -> None:
    hub.add("user/two", {"adapter.safetensors": lora, "pytorch_lora_weights.safetensors": lora})
    assert local_path("user/two").name == "adapter.safetensors"
    hub.add("user/deep", {"weights/only.safetensors": lora})
    assert local_path("user/deep").name == "only.safetensors"
    pipe = tiny_pipeline("sd")
    folder = peft_folder.PeftFolder().save(trained(pipe), tmp_path / "peft").parent
    hub.add("user/peft", {file.name: file.read_bytes() for file in folder.iterdir()})
    assert veneer.load(tiny_pipeline("sd"), "user/peft").method.name == "lora"


def test_several_files_are_listed(hub: Hub, lora: bytes) -> None:
    hub.add("user/many", {"b.safetensors": lora, "a.safetensors": lora, "old.bin": b""})
    with raises(HubError, where="file", given="user/many", expected=("a.safetensors", "b.safetensors")):
        local_path("user/many")
    assert local_path("user/many/b.safetensors").name == "b.safetensors"


def test_pickles_are_rejected_before_any_download(hub: Hub) -> None:
    hub.add("user/pickle", {"pytorch_lora_weights.bin": b"\x80\x02"})
    for name in ("user/pickle", "user/pickle/pytorch_lora_weights.bin"):
        with raises(HubError, where="pickle", given=name, expected=".safetensors"):
            veneer.load(tiny_pipeline("sd"), name)
    assert not [request for request in hub.requests if "resolve" in request]
    hub.add("user/empty", {"README.md": b""})
    with raises(HubError, where="file", given="user/empty"):
        local_path("user/empty")


def test_missing_private_and_gated_repositories(hub: Hub, lora: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("user/private", {"lora.safetensors": lora}, private=True)
    hub.add("user/gated", {"lora.safetensors": lora}, gated=True)
    hub.add("user/toy", {"lora.safetensors": lora})
    for name, where, status in (
        ("user/none", "repository", 401),
        ("user/private", "repository", 401),
        ("user/gated", "gated", 403),
        ("user/toy@v9", "revision", 404),
        ("user/toy/other.safetensors", "file", None),
    ):
        with raises(HubError, where=where, given=name, status=status):
            local_path(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert local_path("user/private").is_file()
    with raises(HubError, where="repository", given="user/none", status=404):
        local_path("user/none")


def test_offline_uses_the_cache(hub: Hub, lora: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("user/toy", {"lora.safetensors": lora, "config.json": b"{}"})
    online = tensors("user/toy")
    address = disconnect(monkeypatch)
    assert all(torch.equal(tensor, online[key]) for key, tensor in tensors("user/toy").items())
    assert local_path("user/toy/lora.safetensors").is_file()
    for name in ("user/other", "user/toy@v2"):
        with raises(HubError, where="hub", given=name, status=None) as caught:
            local_path(name)
        assert address in str(caught.value)
    with raises(HubError, where="file", given="user/toy/b.safetensors"):
        local_path("user/toy/b.safetensors")


def test_commands_take_hub_names(hub: Hub, lora: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("sd")
    base = str(tmp_path / "base")
    pipe.save_pretrained(base)
    hub.add("user/toy", {"lora.safetensors": lora})
    monkeypatch.chdir(tmp_path)
    path, scale = parse_adapter("user/toy:0.5")
    assert (path.name, scale) == ("lora.safetensors", 0.5)
    assert any("lora" in line for line in inspect_file(InspectConfig(Path("user/toy"))))
    assert convert(ConvertConfig(Path("user/toy"), "diffusers", base))[0] == "lora-diffusers.safetensors"
    assert (tmp_path / "lora-diffusers.safetensors").is_file(), "not in the cache"
    merge(MergeConfig((Path("user/toy"), Path("user/toy@main")), base=base, out=tmp_path / "merged.safetensors"))
    resize(ResizeConfig(Path("user/toy"), rank=1, base=base, out=tmp_path / "small.safetensors"))
    merged, small = (veneer.load(tiny_pipeline("sd"), tmp_path / f"{name}.safetensors") for name in ("merged", "small"))
    counts = [sum(p.numel() for p in a.parameters()) for a in (small, veneer.load(pipe, "user/toy"), merged)]
    assert counts == [counts[0], 2 * counts[0], 4 * counts[0]], "ranks 1, 2 and 2 + 2"


def test_diffusers_files_load_by_hub_name(hub: Hub, tmp_path: Path) -> None:
    attached = trained(tiny_pipeline("sd"))
    file = diffusers.save(attached, tmp_path / "pytorch_lora_weights.safetensors")
    hub.add("user/diffusers", {file.name: file.read_bytes()})
    loaded = veneer.load(tiny_pipeline("sd"), "user/diffusers")
    assert sorted(t.sum().item() for t in loaded.parameters()) == sorted(t.sum().item() for t in attached.parameters())


def test_datasets_of_image_folders(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"train/{name}/{i}.png": _image(i) for name in ("cat", "dog") for i in range(3)}
    hub.add("user/pets", {**files, "README.md": b"", "weights.bin": b""}, kind="dataset")
    source = open_source("user/pets")
    assert (source.where, source.classes, len(source)) == ("user/pets", ("cat", "dog"), 6)
    assert source.read(source.examples[4]).size == (8, 8)
    assert not [request for request in hub.requests if request.endswith(("weights.bin", "README.md"))]
    disconnect(monkeypatch)
    assert len(open_source("user/pets")) == 6


def test_datasets_without_readable_files(hub: Hub) -> None:
    hub.add("user/archive", {"data.zip": b""}, kind="dataset")
    hub.add("user/model", {"lora.safetensors": b""})
    with raises(HubError, where="files", given="user/archive"):
        open_source("user/archive")
    with raises(HubError, where="repository", given="user/model"):
        open_source("user/model")


def _image(seed: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (seed * 40, 10, 10)).save(data, "PNG")
    return data.getvalue()


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
