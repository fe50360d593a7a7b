"""The page Generate: generation, invalid requests, and settings read from an image."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import timm
from PIL import Image, PngImagePlugin
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context, show_errors
from veneer.apps.limits import LIMITS
from veneer.apps.pages.generate import generate_page
from veneer.apps.pages.generate.generation import generate, read_image_settings, text_adapters
from veneer.apps.pages.shared import images as pictures
from veneer.apps.pages.shared.generation_fields import base_defaults, values
from veneer.apps.pages.shared.generation_request import (
    BATCH_SIZE,
    MAX_STRENGTH,
    GenerationRequest,
    parse_request,
    select_adapters,
)
from veneer.apps.workspace import Workspace
from veneer.pipelines.generate import is_diffusion_adapter

import veneer
from tests.apps.adapters import perturbed
from tests.raising import carries, raises
from veneer.formats import native
from veneer.injection import VeneerError
from veneer.injection.errors import ConditionError, OptionError, UnknownName
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.report.png_metadata import read_settings, save_png
from veneer.training.report.previews import PreviewSettings, previews

PROMPT = "a red <toy>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text('{"steps": 2, "guidance_scale": 4.0, "negative_prompt": "blur"}')
    return str(folder)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, base: str) -> Context:
    """A context whose user has a LoRA, a token embedding and a control adapter."""
    context = Context.create(tmp_path_factory.mktemp("workspaces"), "cpu")
    folder = context.workspace(None).adapters
    folder.mkdir(parents=True)
    word = {"tokens": "<toy>", "initialize": "cat"}
    for name, method, options in (("style", "lora", {}), ("word", "textual_inversion", word), ("maps", "t2i_adapter", {})):
        attached = perturbed(veneer.base_models.load(base), method, 2.0 if name == "word" else 0.3, **options)
        native.save(attached, folder / f"{name}.safetensors", provenance={"concept": "<toy>", "class_word": "toy"})
    return context


def generation(base: str, **changed: Any) -> GenerationRequest:
    return GenerationRequest(**{"base": base, "prompt": PROMPT, "steps": 2, "guidance": 4.0, **changed})


def last(
    context: Context, wanted: GenerationRequest, names: list[str], strengths: list[float], way: str
) -> tuple[list[tuple[str, str]], str]:
    return list(generate(context, context.workspace(None), wanted, names, strengths, way))[-1]


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def expected(wanted: GenerationRequest, seed: int, scale: float, word: str | None = None) -> np.ndarray:
    pipe = veneer.base_models.load(wanted.base)
    if scale:
        veneer.load(pipe, expected.file, scale=scale)  # type: ignore[attr-defined]
    settings = PreviewSettings((seed,), wanted.steps, wanted.guidance, wanted.negative, wanted.size)
    [made] = previews(pipe, [wanted.prompt], settings, {"<toy>": word} if word else None)
    return np.asarray(made.image)


def test_with_and_without_side_by_side(context: Context, base: str) -> None:
    expected.file = context.workspace(None).adapter("style")  # type: ignore[attr-defined]
    wanted = generation(base, seed=5, count=2, size=(32, 64))
    found, told = last(context, wanted, ["style"], [0.5], "both")
    assert [caption for _, caption in found] == ["without, seed 5", "with, seed 5", "without, seed 6", "with, seed 6"]
    assert told == "4 of 4"
    for (path, _), (seed, scale) in zip(found, ((5, 0), (5, 0.5), (6, 0), (6, 0.5)), strict=True):
        alone = expected(wanted, seed, scale, None if scale else "toy")
        assert np.abs(pixels(path).astype(int) - alone).max() <= 1, "two at once, but for rounding"
    told = read_settings(found[1][0])
    assert told["adapters"] == [{"file": "style", "scale": 0.5}]
    assert (told["seed"], told["size"], told["prompt"], told["base"]) == (5, [32, 64], PROMPT, base)
    assert read_settings(found[0][0])["adapters"] == []


@pytest.mark.parametrize("name", ["word", "style"])
def test_base_model_gets_the_class_word_for_a_trained_token(context: Context, base: str, name: str) -> None:
    """Both for a trained token and for changed base embeddings."""
    wanted = generation(base)
    found, _ = last(context, wanted, [name], [1.0], "both")
    assert np.array_equal(pixels(found[0][0]), expected(wanted, 0, 0, "toy"))
    assert not np.array_equal(pixels(found[0][0]), pixels(found[1][0]))
    assert read_settings(found[0][0])["prompt"] == PROMPT


def test_strength_sweep(context: Context, base: str) -> None:
    expected.file = context.workspace(None).adapter("style")  # type: ignore[attr-defined]
    wanted = generation(base, count=2)
    steps = list(generate(context, context.workspace(None), wanted, ["style"], [0.8], "sweep"))
    assert [len(found) for found, _ in steps] == [0, 2, 4, 6, 8, 10, 12, 13], "shown as they come"
    (grid, what), *found = steps[-1][0]
    assert what == "all strengths"
    assert read_settings(grid)["adapters"] == [{"file": "style", "scale": 0.8}]
    high, wide, _ = pixels(grid).shape
    assert wide > 6 * 192
    assert high > 2 * 192
    assert np.abs(pixels(found[0][0]).astype(int) - expected(wanted, 0, 0, "toy")).max() <= 1
    assert np.abs(pixels(found[10][0]).astype(int) - expected(wanted, 0, 1.25 * 0.8)).max() <= 1
    assert found[10][1] == "strength × 1.25, seed 0"


def test_settings_are_read_from_an_image(context: Context, base: str, tmp_path: Path) -> None:
    wanted = generation(base, seed=7, negative="blur", size=(32, 64))
    [(path, _)], _ = last(context, wanted, ["style", "word"], [0.5, 1.0], "with")
    found, there, note = read_image_settings(context.workspace(None), path)
    assert (found, there) == (wanted, {"style": 0.5, "word": 1.0})
    assert values(found) == [base, PROMPT, "blur", 7, 2, 4.0, 64, 32, 1]
    assert note == "The settings are filled in. Press *Generate*."
    stranger = Workspace(context.root, "somebody else")
    assert read_image_settings(stranger, path)[1] == {}, "another's adapters are not theirs"
    assert "that you do not have: style, word" in read_image_settings(stranger, path)[2]


def test_invalid_settings_are_rejected(context: Context, tmp_path: Path) -> None:
    here = context.workspace(None)
    picture = Image.new("RGB", (32, 32))
    picture.save(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "huge.png").write_bytes(huge())
    base = {"prompt": "a cat", "seed": 0, "steps": 2, "guidance": 3}
    save_png(picture, tmp_path / "steps.png", {**base, "steps": 10**9})
    save_png(picture, tmp_path / "seed.png", {**base, "seed": "1; rm"})
    save_png(picture, tmp_path / "scale.png", {**base, "adapters": [{"file": "style", "scale": 1e9}]})
    for name, value in (("list", [1]), ("deep", {"prompt": ["a"]})):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("veneer", json.dumps(value))
        picture.save(tmp_path / f"{name}.png", pnginfo=info)
    cases: dict[str, dict[str, Any]] = {
        "bare": {"file": "bare.png", "where": "settings", "given": None},
        "text": {"file": "text.png", "given": "SVG"},
        "huge": {"file": "huge.png", "where": "max_pixels"},
        "steps": {"option": "steps", "given": 10**9},
        "seed": {"option": "seed", "given": "1; rm"},
        "scale": {"option": "strength", "given": 1e9},
        "list": {"file": "list.png", "where": "settings", "given": [1]},
        "deep": {"option": "prompt", "given": ""},
    }
    for name, data in cases.items():
        with raises(VeneerError, **data) as error:
            read_image_settings(here, tmp_path / f"{name}.png")
        assert str(tmp_path) not in str(error.value)
    with raises(OptionError, option="picture", given=None):
        read_image_settings(here, None)
    html = "<b>x</b>"
    save_png(picture, tmp_path / "html.png", {**base, "adapters": [{"file": html, "scale": 1}]})
    assert "<" not in read_image_settings(here, tmp_path / "html.png")[2]


def huge() -> bytes:
    """The header of a PNG of 300 megapixels."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 15_000, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    return body + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize(
    ("given", "option", "wrong"),
    [
        ({"prompt": " "}, "prompt", ""),
        ({"prompt": "a" * (LIMITS.text + 1)}, "prompt", LIMITS.text + 1),
        ({"steps": LIMITS.steps + 1}, "steps", LIMITS.steps + 1),
        ({"steps": None}, "steps", None),
        ({"guidance": "nan"}, "guidance", "nan"),
        ({"width": LIMITS.side + 8}, "width", LIMITS.side + 8),
        ({"width": 64, "height": 0}, "size", (0, 64)),
        ({"count": LIMITS.images + 1}, "number of images", LIMITS.images + 1),
        ({"seed": -1}, "seed", -1),
    ],
)
def test_requests_beyond_the_limits_are_rejected(given: dict[str, Any], option: str, wrong: Any) -> None:
    defaults = {
        "base": "bundled",
        "prompt": "a cat",
        "negative": "",
        "seed": 0,
        "steps": 2,
        "guidance": 3,
        "width": 64,
        "height": 64,
    }
    assert parse_request(**defaults, count=1).size == (64, 64)
    with raises(OptionError, option=option, given=wrong):
        parse_request(**{**defaults, "count": 1, **given})


def test_images_are_generated_in_batches() -> None:
    for count in (1, BATCH_SIZE, BATCH_SIZE + 1, LIMITS.images):
        parts = parse_request("bundled", "a cat", "", 3, 2, 3, 0, 0, count).batches()
        assert all(len(part.seeds) <= BATCH_SIZE for part in parts)
        assert [seed for part in parts for seed in part.seeds] == list(range(3, 3 + count))


def test_defaults_of_a_base_model_respect_the_limits(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path)
    (tmp_path / "veneer.json").write_text(json.dumps({"steps": LIMITS.steps + 50}))
    assert base_defaults(str(tmp_path))[0] == LIMITS.steps


def test_adapters_read_from_an_image_are_limited(tmp_path: Path) -> None:
    here = Workspace(tmp_path / "space")
    here.adapters.mkdir(parents=True)
    names = [f"a{n}" for n in range(LIMITS.adapters + 1)]
    for name in names:
        (here.adapters / f"{name}.safetensors").touch()
    facts = {"prompt": "a cat", "seed": 0, "steps": 2, "guidance": 3}
    adapters = [{"file": name, "scale": -1.0} for name in names]
    save_png(Image.new("RGB", (32, 32)), tmp_path / "a.png", {**facts, "adapters": adapters})
    assert read_image_settings(here, tmp_path / "a.png")[1] == dict.fromkeys(names[:-1], -1.0)
    assert len(generate_page.strength_sliders(names)) == LIMITS.adapters
    assert select_adapters(here, ["a1"], [-MAX_STRENGTH])["a1"].strength == -MAX_STRENGTH


def test_classifier_is_not_a_text_adapter(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.adapters.mkdir(parents=True)
    probe = veneer.attach(timm.create_model("vit_tiny_patch16_224", depth=1), "bitfit")
    native.save(probe, workspace.adapters / "digits.safetensors")
    assert [*workspace.all_adapters()] == ["digits"]
    assert text_adapters(workspace) == []
    assert not is_diffusion_adapter(workspace.adapter("digits"))


def test_adapter_selection_is_validated(context: Context, base: str) -> None:
    here = context.workspace(None)
    assert text_adapters(here) == ["style", "word"], "control adapters are used on the page Control"
    too_many = {"option": "pictures", "given": 18, "expected": 16}
    cases: tuple[tuple[list[str], list[int], str, int, dict[str, Any]], ...] = (
        (["../style"], [1], "with", 1, {"name": "../style", "kind": "adapter"}),
        (["style"], [9], "with", 1, {"option": "strength of style", "given": 9}),
        (["style", "style"], [1, 1], "with", 1, {"option": "adapters", "given": ("style", "style")}),
        (["a"] * 9, [1] * 9, "with", 1, {"option": "adapters", "given": 9, "expected": 8}),
        ([], [], "both", 1, {"option": "adapters", "given": 0}),
        (["style"], [1], "sweep", 3, too_many),
        (["style"], [1], "both", 9, too_many),
        (["style"], [1], "all", 1, {"option": "way", "given": "all"}),
    )
    for names, strengths, way, count, data in cases:
        with raises(VeneerError, **data):
            last(context, generation(base, count=count), names, strengths, way)
    with pytest.raises(ConditionError):
        last(context, generation(base, count=1), ["maps"], [1], "with")
    with raises(UnknownName, name="style", kind="adapter"):
        list(generate(context, Workspace(context.root, "eve"), generation(base), ["style"], [1], "with"))


def test_errors_of_a_generator_handler_are_shown(context: Context, base: str) -> None:
    with pytest.raises(gr.Error) as caught:
        list(show_errors(generate)(context, context.workspace(None), generation(base), ["x"], [1], "with"))
    assert caught.value.__cause__ is not None
    carries(caught.value.__cause__, name="x", kind="adapter")


def test_fields_follow_the_base_model_and_old_images_are_deleted(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert base_defaults(base) == [2, 4.0, "blur", 0, 0]
    assert base_defaults("bundled") == [20, 3.0, "", 128, 128]
    with pytest.raises(VeneerError):
        base_defaults("../../etc/passwd")
    monkeypatch.setattr(pictures.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(pictures.tempfile, "tempdir", str(tmp_path))
    old, young = pictures.new_folder(), pictures.new_folder()
    later = young.stat().st_mtime + pictures.LIFETIME_SECONDS + 1000
    monkeypatch.setattr(pictures.time, "time", lambda: later)
    assert pictures.new_folder().exists()
    assert not old.exists()
    assert not young.exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_page_builds(tmp_path: Path) -> None:
    """Closes event loops that Gradio leaves open."""
    with AppBlocks():
        generate_page.PAGE.build(Context.create(tmp_path))
    assert [part["visible"] for part in (each.get_config() for each in generate_page.strength_sliders(["a"]))].count(True) == 1
    gc.collect()
