"""`veneer push`: what is uploaded, the model card, updates, and errors, against a local server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load, load_file
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.push import PushConfig, push

import veneer
from tests.formats.test_model_spec import metadata
from tests.raising import raises
from veneer.classification.predict import open_predictor
from veneer.formats import convert, local_path
from veneer.hub import HubError
from veneer.injection.errors import OptionError, VeneerError
from veneer.publishing import read_run
from veneer.publishing.adapter_metadata import public_provenance
from veneer.testing.pipelines import tiny_pipeline

from .conftest import disconnect, environment
from .runs import SECRET, base_files, classification, control_run, personalization, set_provenance
from .server import READ_TOKEN, Hub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # of the hub's client with httpx
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # of diffusers
]
STEPS = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a small pipeline."""
    return base_files(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def finished(local_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of pivotal tuning."""
    return on_hub(personalization(tmp_path_factory.mktemp("finished"), local_base, method="pivotal"))


@pytest.fixture
def run(hub: Hub, base: dict[str, bytes], finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose base model is on the hub and in the cache."""
    hub.add("owner/tiny", base)
    snapshot_download("owner/tiny")
    return Path(shutil.copytree(finished, tmp_path / "run"))


def on_hub(folder: Path, base: str = "owner/tiny") -> Path:
    """The run, as if its base model were on the hub."""
    record = json.loads((folder / "result.json").read_text())
    record["config"]["base"] = base
    (folder / "result.json").write_text(json.dumps(record))
    set_provenance(folder / "adapter.safetensors", base=base, base_source="local" if Path(base).exists() else "hub")
    return folder


@pytest.fixture(scope="module")
def local_base(base: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small pipeline in a local folder."""
    folder = tmp_path_factory.mktemp("local") / SECRET / "base"
    for name, content in base.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.fixture(scope="module")
def controlled(local_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a ControlNet on a local base model."""
    return control_run(tmp_path_factory.mktemp("control"), local_base)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a classifier."""
    return classification(tmp_path_factory.mktemp("classes"))


def card(folder: Path) -> ModelCard:
    """The model card in a folder."""
    return ModelCard.load(folder / "README.md")


def uploaded(hub: Hub, name: str) -> dict[str, bytes]:
    """Files of the newest commit of a repository."""
    return hub.repositories[name].commits[-1][1]


def test_personalization_is_uploaded_and_loads_again(
    hub: Hub, token: None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = push(PushConfig(run, "user/toy", license="cc-by-4.0"))
    assert lines[-1] == f"uploaded to {hub.address}/user/toy"
    files = uploaded(hub, "user/toy")
    assert set(files) == {
        ".gitattributes", "README.md", "adapter.safetensors", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors",
        "comfyui/toy.safetensors", "comfyui/embeddings/toy.safetensors", "samples/grid.png", "samples/00.png", "samples/01.png",
    }  # fmt: skip
    assert not hub.repositories["user/toy"].private
    for name in ("adapter", "pytorch_lora_weights", "learned_embeds"):
        sent, own = load(files[f"{name}.safetensors"]), load_file(run / f"{name}.safetensors")
        assert sent.keys() == own.keys()
        assert all(torch.equal(tensor, own[key]) for key, tensor in sent.items()), name
    attached = veneer.load_all(DiffusionPipeline.from_pretrained("owner/tiny"), "user/toy")
    expected = veneer.load_all(tiny_pipeline("sd"), run / "adapter.safetensors", base="any")
    for one, other in zip(attached, expected, strict=True):
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())
    disconnect(monkeypatch)
    assert local_path("user/toy").read_bytes() == files["adapter.safetensors"], "from the cache"


def test_snippets_of_diffusers_give_the_images_of_veneer(hub: Hub, token: None, run: Path) -> None:
    push(PushConfig(run, "user/toy"))
    text = uploaded(hub, "user/toy")["README.md"].decode()
    (code,) = [block.split("```")[0] for block in text.split("```python\n")[1:] if "diffusers" in block.split("```")[0]]
    assert "load_lora_weights" in code
    assert "load_textual_inversion" in code
    settings = f"{STEPS | {'guidance_scale': 1.0}}"
    scope: dict[str, Any] = {"torch": torch}
    exec(
        code.replace(
            "image = pipe('a <toy>').images[0]", f"image = pipe('a <toy>', generator=torch.manual_seed(0), **{settings})"
        ),
        scope,
    )
    pipe = DiffusionPipeline.from_pretrained("owner/tiny")
    veneer.load_all(pipe, "user/toy")
    own = pipe("a <toy>", generator=torch.manual_seed(0), **STEPS, guidance_scale=1.0)
    plain = DiffusionPipeline.from_pretrained("owner/tiny")(
        "a <toy>", generator=torch.manual_seed(0), **STEPS, guidance_scale=1.0
    )
    assert torch.allclose(scope["image"].images, own.images, atol=1e-4)
    assert not torch.allclose(plain.images, own.images, atol=1e-4)


def test_card_of_a_personalization(hub: Hub, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "card"
    lines = push(PushConfig(run, "user/toy", license="cc-by-4.0", dry_run=True, out=out))
    assert str(out) in lines[-1]
    assert "user/toy" not in hub.repositories
    data = card(out).data.to_dict()
    assert {k: data[k] for k in ("license", "base_model", "library_name", "pipeline_tag", "instance_prompt")} == {
        "license": "cc-by-4.0", "base_model": "owner/tiny", "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "instance_prompt": "a photo of <toy>",
    }  # fmt: skip
    assert {"text-to-image", "diffusers", "lora", "textual-inversion", "template:sd-lora", "veneer"} <= {*data["tags"]}
    assert data["widget"] == [
        {"text": "a <toy>", "output": {"url": "samples/00.png"}},
        {"text": "a <toy> | at night", "output": {"url": "samples/01.png"}},
    ]
    assert all((out / each["output"]["url"]).is_file() for each in data["widget"])
    text = card(out).text
    record = json.loads((run / "result.json").read_text())
    gain = record["metrics"]["similarity"]["gain"]
    assert f"| similarity to the photos: gain | {gain['mean']:+.3f} | {gain['low']:+.3f} to {gain['high']:+.3f} |" in text
    for expected in (
        "`<toy>`",
        "user/toy",
        "| steps | 1 |",
        "veneer generate",
        "load_lora_weights",
        "samples/grid.png",
        "`cc-by-4.0`",
    ):
        assert expected in text
    assert "sd_v1" in metadata(out / "comfyui/toy.safetensors")["ss_base_model_version"]
    assert metadata(out / "comfyui/toy.safetensors")["modelspec.trigger_phrase"] == "toy"


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


def test_control_loads_in_diffusers(hub: Hub, token: None, controlled: Path, tmp_path: Path) -> None:
    folder = on_hub(Path(shutil.copytree(controlled, tmp_path / "run")))
    push(PushConfig(folder, "user/canny", private=True))
    assert hub.repositories["user/canny"].private
    files = uploaded(hub, "user/canny")
    assert {"adapter.safetensors", "diffusers/config.json", "diffusers/diffusion_pytorch_model.safetensors"} <= files.keys()
    loaded = ControlNetModel.from_pretrained("user/canny", subfolder="diffusers")
    own = load_file(folder / "diffusers/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, own[key]) for key, tensor in loaded.state_dict().items())
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (data["base_model"], data["library_name"]) == ("owner/tiny", "diffusers")
    assert "controlnet" in data["tags"]
    assert [each["output"]["url"] for each in data["widget"]] == ["samples/00.png", "samples/01.png"]
    text = files["README.md"].decode()
    assert 'ControlNetModel.from_pretrained("user/canny", subfolder="diffusers")' in text
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert f"| {metrics['followed']:.3f} |" in text


def test_classifier_predicts_by_hub_name(hub: Hub, token: None, classified: Path) -> None:
    folder = classified
    push(PushConfig(folder, "user/colors", license="mit"))
    files = uploaded(hub, "user/colors")
    assert {"adapter.safetensors", "model.json", "confusion.png", "curves.png"} <= files.keys()
    assert json.loads(files["model.json"])["model"] == "vit"
    data = ModelCard(files["README.md"].decode()).data
    assert data.pipeline_tag == "image-classification"
    (result,) = data.eval_results
    record = json.loads((folder / "result.json").read_text())
    assert result.metric_value == pytest.approx(record["test_accuracy"], abs=1e-4)
    low, high = record["test_interval_95"]
    assert f"{low:.1%} to {high:.1%}" in files["README.md"].decode()
    image = next((folder.parent / "images").rglob("*.png"))
    hub.repositories["user/colors"].commit({"model.json": (folder / "model.json").read_bytes()})  # the local model, by its path
    (line,) = predict(PredictConfig(Path("user/colors"), (image,), format="json"))
    (own,) = open_predictor(folder).predict([image])
    assert json.loads(line)["label"] == own.label
    assert json.loads(line)["probability"] == own.probability


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


def test_folder_of_a_dry_run(run: Path, tmp_path: Path) -> None:
    first, second = (push(PushConfig(run, "user/toy", dry_run=True))[-1] for _ in range(2))
    assert first.endswith(str(run / "hub"))
    assert second.endswith(str(run / "hub-2"))
    one, other = ({p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*.*")} for f in (run / "hub", run / "hub-2"))
    assert one == other, "the date is that of the run"
    with raises(OptionError, option="out", file=run / "hub", expected="empty"):
        push(PushConfig(run, "user/toy", dry_run=True, out=run / "hub"))


def test_exported_file_has_the_weight_updates_of_the_adapter(run: Path, tmp_path: Path) -> None:
    push(PushConfig(run, "user/toy", dry_run=True, out=tmp_path / "out"))
    pipe = tiny_pipeline("sd")
    convert(pipe, run / "pytorch_lora_weights.safetensors", "kohya", tmp_path / "own")
    own, sent = load_file(tmp_path / "own.safetensors"), load_file(tmp_path / "out/comfyui/toy.safetensors")
    assert own.keys() == sent.keys()
    assert all(torch.equal(tensor, sent[key]) for key, tensor in own.items())


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


def test_command_line(hub: Hub, run: Path, tmp_path: Path) -> None:
    """The installed command, in a process of its own: a dry run, and an upload without a token."""
    start = "import sys; from veneer.cli import main; sys.exit(main(sys.argv[1:]))"
    settings = environment(hub, tmp_path / "elsewhere")
    words = [sys.executable, "-c", start, "push", str(run), "user/toy"]
    done = subprocess.run(words, capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "HF_TOKEN" in done.stderr.splitlines()[-1]
    settings["HF_TOKEN"] = "hf_" + "a" * 34
    done = subprocess.run(words, capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded to {hub.address}/user/toy"
    assert "adapter.safetensors" in uploaded(hub, "user/toy")
