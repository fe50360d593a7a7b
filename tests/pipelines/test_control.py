"""`veneer control` on a tiny pipeline: files, metrics, resume, map files, and generation."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import load_file
from veneer.pipelines.control import ControlConfig, ControlGenerateConfig, control, generate_controlled

import veneer
from tests.methods.controls import drawn, picture
from tests.raising import raises
from veneer.control.training_images import open_training_images
from veneer.injection.errors import OptionError, UnknownName, VeneerError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.families import family
from veneer.training.preflight.preflight import PreflightError

QUICK: Mapping[str, Any] = {
    "steps": 2, "batch": 2, "tracker": "none", "template": "a thing", "validation": 0.34, "grid_images": 2, "preview_every": 0,
}  # fmt: skip
SIDE = 32
OPTIONS: dict[str, dict[str, Any]] = {"controlnet": {}, "t2i_adapter": {}, "controlnext": {}, "ip_adapter": {}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a saved tiny pipeline that samples in a few steps."""
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text(
        '{"steps": 3, "things": ["cat", "dog"], "scenes": ["a {thing}, left", "a {thing}, right"]}'
    )
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        picture(i, SIDE).save(folder / f"{i}.png")
    return folder


def run(base: str, photos: Path | None, out: Path, **settings: Any) -> Path:
    return control(ControlConfig(data=photos, base=base, out=out, **{**QUICK, **settings}))


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_leaves_its_files_and_metrics(base: str, photos: Path, tmp_path: Path, method: str) -> None:
    out = run(base, photos, tmp_path / "out", method=method, preview_every=None)
    assert {"adapter.safetensors", "maps.png", "sheet.png", "curve.json"} <= {p.name for p in out.iterdir()}
    authors = method == "controlnext"  # which diffusers has no class for
    assert [(out / name).is_dir() for name in ("diffusers", "controlnext")] == [not authors, authors]
    record = json.loads((out / "result.json").read_text())
    assert [point["step"] for point in record["curve"]] == [1, 2]
    metrics = record["metrics"]
    assert metrics["count"] == 4, "two images, two seeds of each"
    assert metrics["over_free"][0] == pytest.approx(metrics["followed"] - metrics["free"])
    assert (metrics["measure"] == "similarity (bundled)") == (method == "ip_adapter")
    assert record["verdict"].keys() == {"outcome", "summary", "reasons", "advice"}
    pipe = veneer.base_models.load(base)
    loaded = veneer.load(pipe, out)
    assert loaded.provenance["condition"] == record["config"]["condition"]
    if authors:
        ours, theirs = (a.state_dict() for a in (loaded, veneer.load(veneer.base_models.load(base), out / "controlnext")))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(t, theirs[key]) for key, t in ours.items())
        assert loaded.extras, "weights of the base as well"


def test_weights_change_and_diffusers_generates_the_same(base: str, photos: Path, tmp_path: Path) -> None:
    out = run(base, photos, tmp_path / "out", learning_rate=0.05, condition="grey", eval_seeds=0)
    assert not (out / "sheet.png").exists()
    pipe = veneer.base_models.load(base)
    loaded = veneer.load(pipe, out)
    with loaded.condition(image=picture(1)):
        ours = drawn(pipe)
    with loaded.enabled(False):
        assert not np.array_equal(ours, drawn(pipe))
    loaded.detach()
    net = ControlNetModel.from_pretrained(out / "diffusers")
    theirs = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    np.testing.assert_allclose(ours, drawn(theirs, image=picture(1)), atol=1e-4)


@pytest.mark.parametrize("method", ["controlnet", "ip_adapter"])
def test_a_stopped_run_saves_its_weights_and_resumes_bitwise(
    base: str, photos: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"method": method, "learning_rate": 0.01, "eval_seeds": 0, "crop": "random", "flip": 0.5, "steps": 4}
    whole = run(base, photos, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(
            "veneer.pipelines.control.write_preview", lambda run, step: step == 2 and signal.raise_signal(signal.SIGTERM)
        )
        parts = run(base, photos, tmp_path / "parts", preview_every=1, **options)
    assert not (parts / "result.json").exists()
    assert f"stopped after step 3 of 4; the weights so far are in {parts}/adapter.safetensors" in capsys.readouterr().out
    kept = load_file(parts / "adapter.safetensors")
    assert veneer.load(veneer.base_models.load(base), parts).loaded.clean
    run(base, photos, parts, resume=True, **options)
    a, b = (load_file(out / "adapter.safetensors") for out in (whole, parts))
    assert a.keys() == b.keys() == kept.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], kept[name]) for name in a)


def test_the_base_model_generates_missing_training_images(base: str, tmp_path: Path) -> None:
    config = ControlConfig(base=base, generated_images=6, out=tmp_path, **QUICK).with_defaults()
    kind = family(veneer.base_models.load(base))
    found = open_training_images(config, kind, tmp_path)
    assert {p.caption for p in (*found.train, *found.held)} <= {"a cat", "a dog"}, "the thing and no place"
    assert len(found.held) == 2
    assert not {p.path for p in found.held} & {p.path for p in found.train}
    again = open_training_images(config, kind, tmp_path)
    assert [p.digest for p in again.train] == [p.digest for p in found.train]
    with raises(OptionError, option="data", expected="pairs"):
        open_training_images(ControlConfig(base=base, condition="pairs", out=tmp_path, **QUICK), kind, tmp_path)


def test_map_files_are_cropped_as_the_photos(base: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("images", "conditions"):
        (data / part).mkdir(parents=True)
    for i in range(4):
        photo = picture(i, SIDE).resize((48, SIDE))
        photo.save(data / "images" / f"{i}.png")
        photo.save(data / "conditions" / f"{i}.png")  # maps that are the photos: any other window would show
    seen: list[float] = []
    from veneer.control import loss as module

    own = module.MapInput.map
    with pytest.MonkeyPatch.context() as patch:

        def kept(self: Any, example: Any) -> Any:
            found = own(self, example)
            seen.append((found - (example.pixels + 1) / 2).abs().max().item())
            return found

        patch.setattr(module.MapInput, "map", kept)
        out = run(
            base, data, tmp_path / "out", condition="pairs", crop="random", flip=0.5, buckets=False, eval_seeds=1, validation=0.5
        )
    assert len(seen) == 4
    assert max(seen) < 0.01
    assert json.loads((out / "result.json").read_text())["metrics"]["measure"] == "similarity (bundled)"


def test_generation_with_a_trained_adapter(base: str, photos: Path, tmp_path: Path) -> None:
    out = run(base, photos, tmp_path / "out", learning_rate=0.05, eval_seeds=0)
    photo, size = photos / "0.png", (SIDE, SIDE)
    files = generate_controlled(
        ControlGenerateConfig(("a cat",), (str(out),), image=(photo,), size=size, images_per_prompt=2, out=tmp_path / "a")
    )
    assert [f.name for f in files] == ["map-1.png", "a-cat-0.png", "a-cat-1.png"]
    given = generate_controlled(
        ControlGenerateConfig(("a cat",), (str(out),), map=(files[0],), size=size, images_per_prompt=2, out=tmp_path / "b")
    )
    assert all(np.array_equal(Image.open(a), Image.open(b)) for a, b in zip(files, given, strict=True)), "its map, or the photo"
    part = generate_controlled(
        ControlGenerateConfig(("a cat",), (f"{out}:0.5",), image=(photo,), size=size, end=0.5, out=tmp_path / "c")
    )
    assert not np.array_equal(Image.open(part[1]), Image.open(files[1]))
    with raises(OptionError, option="image", given=0, expected=1):
        generate_controlled(ControlGenerateConfig(("a cat",), (str(out),), size=size, out=tmp_path / "d"))
    with raises(OptionError, option="map", expected="image or map"):
        generate_controlled(ControlGenerateConfig(("a cat",), (str(out),), image=(photo,), map=(photo,), out=tmp_path / "d"))
    with raises(VeneerError, file=photo, expected=(64, 32)):
        generate_controlled(ControlGenerateConfig(("a cat",), (str(out),), image=(photo,), size=(32, 64), out=tmp_path / "d"))


@pytest.mark.parametrize(
    ("options", "option", "given"),
    [
        ({"method": "lora"}, "method", "lora"),
        ({"method": "ip_adapter", "condition": "canny"}, "condition", "canny"),
        ({"condition": "image"}, "condition", "image"),
        ({"validation": 1.0}, "validation", 1.0),
        ({"options": {"lora": {"rank": 2}}}, "options", ("lora",)),
    ],
)
def test_invalid_settings_are_errors_before_training(options: dict[str, Any], option: str, given: Any) -> None:
    with raises(OptionError, option=option, given=given):
        ControlConfig(**options)


def test_an_unknown_condition_suggests_similar_ones() -> None:
    with raises(UnknownName, name="cany", close=("canny",)):
        ControlConfig(condition="cany")


def test_a_method_without_condition_lists_the_supported_ones() -> None:
    with raises(OptionError, option="method", expected=("controlnet", "controlnext", "ip_adapter", "t2i_adapter")):
        ControlConfig(method="lora")


def test_only_looking(base: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(base, photos, tmp_path / "out", dry_run=True)
    assert {p.name for p in out.iterdir()} == {"maps.png"}
    assert "condition canny" in capsys.readouterr().out


def test_a_dry_run_generates_a_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = control(ControlConfig(out=tmp_path / "out", dry_run=True, grid_images=1))
    assert {p.name for p in out.iterdir()} == {"maps.png", "generated"}
    assert len(list((out / "generated").glob("*.png"))) == 8
    assert "8 of 384" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["controlnet", "ip_adapter"])
def test_recomputed_activations_give_the_same_weights(base: str, photos: Path, tmp_path: Path, method: str) -> None:
    options = {"method": method, "learning_rate": 0.01, "eval_seeds": 0}
    plain = run(base, photos, tmp_path / "plain", **options)
    less = run(base, photos, tmp_path / "less", gradient_checkpointing=True, **options)
    a, b = (load_file(out / "adapter.safetensors") for out in (plain, less))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_base_weights_that_train_are_in_float32() -> None:
    assert ControlConfig(method="controlnext").with_defaults().dtype == "float32"
    assert ControlConfig(method="controlnet").with_defaults().dtype is None
    with raises(OptionError, option="dtype", given="bfloat16", expected="float32"):
        ControlConfig(method="controlnext", dtype="bfloat16").with_defaults()


def test_no_disk_space_is_an_error_before_training(
    base: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.training.preflight.preflight.free_bytes", lambda folder: 2**16)
    with pytest.raises(PreflightError) as caught:
        run(base, photos, tmp_path / "out")
    assert [concern.about for concern in caught.value.given] == ["disk"]
    assert not list((tmp_path / "out").glob("checkpoint-*"))
