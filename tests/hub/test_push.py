"""`veneer push`: files of each kind of run, which load again, and their cards, against a local server."""

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
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.push import PushConfig, push

import veneer
from tests.formats.test_model_spec import metadata
from tests.raising import raises
from veneer.classification.predict import open_predictor
from veneer.cli import main
from veneer.formats import convert, local_path
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline

from .conftest import disconnect, environment
from .repositories import card, uploaded
from .runs import on_hub
from .server import TOKEN, Hub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # of the hub's client with httpx
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # of diffusers
]
STEPS = {"num_inference_steps": 2, "output_type": "pt"}


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


def test_command_line_without_a_token(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "user/toy"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "HF_TOKEN" in printed.err.splitlines()[-1]
    assert "user/toy" not in hub.repositories


def test_command_line(hub: Hub, run: Path, tmp_path: Path) -> None:
    """An upload by the installed command, in another process."""
    start = "import sys; from veneer.cli import main; sys.exit(main(sys.argv[1:]))"
    settings = environment(hub, tmp_path / "elsewhere", HF_TOKEN=TOKEN)
    words = [sys.executable, "-c", start, "push", str(run), "user/toy"]
    done = subprocess.run(words, capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded to {hub.address}/user/toy"
    assert "adapter.safetensors" in uploaded(hub, "user/toy")
