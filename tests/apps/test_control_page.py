"""The page Control: condition images, generation, invalid requests and training jobs."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from veneer.apps import jobs
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.limits import LIMITS
from veneer.apps.pages.control import control_page
from veneer.apps.pages.control import generation as page
from veneer.apps.pages.control import training as teaching
from veneer.apps.pages.control.generation import ConditionInput, ControlAdapter
from veneer.apps.pages.control.training import ControlTrainingRequest
from veneer.apps.pages.shared.generation_request import GenerationRequest
from veneer.apps.pages.shared.images import load_sketch
from veneer.apps.workspace import Workspace

import veneer
from tests.apps.adapters import perturbed
from tests.methods.controls import picture
from tests.raising import raises
from veneer.cli import parser_for
from veneer.control.image_embedding import embedder
from veneer.control.maps.maps import get
from veneer.control.maps.sketch import sketch_map
from veneer.formats import native
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError, UnknownName
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.report.png_metadata import read_settings
from veneer.training.report.previews import PreviewSettings, previews

SIDE = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text('{"steps": 2, "things": ["cat"], "scenes": ["a {thing}"], "training": {}}')
    return str(folder)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, base: str) -> Context:
    """A context whose user has a canny adapter, one without a condition type, an image-prompt adapter and a LoRA."""
    context = Context.create(tmp_path_factory.mktemp("workspaces"), "cpu")
    folder = context.workspace(None).adapters
    folder.mkdir(parents=True)
    for name, method, told in (
        ("lines", "t2i_adapter", {"condition": "canny"}),
        ("unsaid", "t2i_adapter", {}),
        ("prompt", "ip_adapter", {"condition": "image"}),
        ("style", "lora", {}),
    ):
        pipe = veneer.base_models.load(base)
        options = {"width": embedder(pipe).width} if name == "prompt" else {}
        attached = perturbed(pipe, method, **options)
        native.save(attached, folder / f"{name}.safetensors", provenance=told)
    return context


def sketch(mode: str = "RGBA") -> bytes:
    """A square on a transparent canvas."""
    sheet = Image.new(mode, (384, 384), (0, 0, 0, 0) if mode == "RGBA" else "white")
    ImageDraw.Draw(sheet).rectangle([100, 100, 280, 280], outline="black", width=8)
    return png(sheet)


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def generation(base: str, **changed: Any) -> GenerationRequest:
    return GenerationRequest(**{"base": base, "prompt": "a cat", "steps": 2, "guidance": 4.0, **changed})


def test_condition_types_of_adapters(context: Context) -> None:
    here = context.workspace(None)
    assert {name: f.condition for name, f in page.control_adapters(here).items()} == {
        "lines": "canny",
        "prompt": "image",
        "unsaid": None,
    }
    assert page.control_adapter(here, "unsaid", "blur").condition == "blur"
    assert page.control_adapter(here, "lines", "blur").condition == "canny", "what its file says counts"
    for name, condition, data in (
        (None, None, {"option": "control", "given": None}),
        ("../lines", None, {"name": "../lines", "kind": "adapter"}),
        ("style", None, {"option": "control", "given": "style"}),
        ("unsaid", "sepia", {"name": "sepia", "kind": "condition"}),
    ):
        with raises(VeneerError, **data):
            page.control_adapter(here, name, condition)
    with raises(UnknownName, name="lines", kind="adapter"):
        page.control_adapter(Workspace(context.root, "eve"), "lines")


def test_condition_images_from_sketch_photo_and_map(tmp_path: Path) -> None:
    size = (64, 32)
    photo = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(photo).ellipse([60, 40, 140, 120], fill="red")
    photo.save(tmp_path / "p.jpg", quality=95)
    path = str(tmp_path / "p.jpg")
    drawn = page.condition_image("canny", ConditionInput("sketch", sketch()), size)
    assert np.array_equal(drawn, sketch_map(load_sketch(sketch("RGB")), "canny", size)), "an empty sheet is white"
    assert drawn.size == size
    made = page.condition_image("canny", ConditionInput("photo", None, path), size)
    middle = Image.fromarray(pixels(path)).crop((0, 30, 200, 130)).resize(size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(made, int) - np.asarray(get("canny")(middle), int)).mean() < 255 * 0.01
    given = Image.fromarray(np.kron(np.eye(4, dtype=np.uint8), np.full((16, 32), 255, np.uint8))).convert("RGB")
    given.save(tmp_path / "map.png")
    whole = page.condition_image("canny", ConditionInput("map", None, str(tmp_path / "map.png")), size)
    assert np.array_equal(whole, given.resize(size, Image.Resampling.NEAREST)), "taken as it is"
    assert page.condition_image("image", ConditionInput("photo", None, path), size).size == (200, 160)
    stripes = Image.new("RGB", (96, 32), "red")
    stripes.paste("blue", (32, 0, 64, 32))
    stripes.save(tmp_path / "stripes.png")
    middle = page.condition_image("canny", ConditionInput("map", None, str(tmp_path / "stripes.png")), (32, 32))
    assert middle.getcolors() == [(32 * 32, (0, 0, 255))], "the middle of a map of another shape"


def test_map_has_the_size_of_the_image(context: Context, base: str) -> None:
    assert page.output_size(context, generation(base, size=(32, 64))) == (64, 32), "width first"
    assert page.output_size(context, generation(base)) == (SIDE, SIDE)


def test_invalid_conditions_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("<html><script>alert(1)</script>")
    empty = png(Image.new("RGBA", (384, 384)))
    no_lines: dict[str, object] = {"where": "sketch", "given": "empty"}
    cases: tuple[tuple[ConditionInput, dict[str, object]], ...] = (
        (ConditionInput("sketch"), no_lines),
        (ConditionInput("sketch", empty), no_lines),
        (ConditionInput("sketch", png(Image.new("RGB", (384, 384), "white"))), no_lines),
        (ConditionInput("sketch", b"GIF8, or not"), {"file": "the sketch", "given": "damaged GIF"}),
        (ConditionInput("sketch", b"\0" * 100), {"file": "the sketch", "given": "unknown"}),
        (ConditionInput("sketch", png(Image.new("1", (6000, 6000)))), {"file": "the sketch", "given": (6000, 6000)}),
        (ConditionInput("photo"), {"option": "picture", "given": None}),
        (ConditionInput("photo", None, str(tmp_path / "x.png")), {"file": "x.png", "given": "HTML"}),
        (ConditionInput("disk"), {"option": "source", "given": "disk"}),
    )
    for given, data in cases:
        with raises(VeneerError, **data) as error:
            page.condition_image("canny", given, (64, 64))
        assert str(tmp_path) not in str(error.value)
    with raises(OptionError, option="source", given="sketch", expected=("photo",)):
        page.condition_image("image", ConditionInput("sketch", sketch()), (64, 64))


def test_generate_without_and_with_control(context: Context, base: str) -> None:
    found = page.control_adapter(context.workspace(None), "lines")
    wanted = generation(base, seed=4)
    given = ConditionInput("sketch", sketch())
    *_, (shown, told) = page.generate(context, found, "lines", wanted, given, 0.8, 0.0, 0.5)
    assert [caption for _, caption in shown] == ["map", "without, seed 4", "with, seed 4"]
    assert told == "1 of 1"
    guide, without, followed = (pixels(path) for path, _ in shown)
    pipe = veneer.base_models.load(base)
    settings = PreviewSettings((4,), 2, 4.0)
    assert np.array_equal(without, np.asarray(previews(pipe, ["a cat"], settings)[0].image))
    attached = veneer.load(pipe, found.file, scale=0.8)
    with attached.condition(image=sketch_map(load_sketch(sketch()), "canny", (SIDE, SIDE)), end=0.5, pipeline=pipe):
        assert np.array_equal(followed, np.asarray(previews(pipe, ["a cat"], settings)[0].image))
    assert not np.array_equal(followed, without)
    assert guide.shape == (SIDE, SIDE, 3)
    facts = read_settings(shown[2][0])
    assert (facts["adapters"], facts["end"], facts["condition"]) == ([{"file": "lines", "scale": 0.8}], 0.5, "canny")


def test_image_prompt(context: Context, base: str, tmp_path: Path) -> None:
    picture(1, 64).save(tmp_path / "p.png")
    found = page.control_adapter(context.workspace(None), "prompt")
    steps = page.generate(
        context, found, "prompt", generation(base, count=2), ConditionInput("photo", None, str(tmp_path / "p.png")), 1, 0, 1
    )
    *_, (shown, _) = steps
    assert len(shown) == 5
    with raises(OptionError, option="picture", given=None):
        list(page.generate(context, found, "prompt", generation(base), ConditionInput("photo"), 1, 0, 1))


@pytest.mark.parametrize(
    ("given", "count", "option", "wrong"),
    [
        ((9, 0, 1), 1, "strength", 9),
        (("x", 0, 1), 1, "strength", "x"),
        ((1, 0.6, 0.4), 1, "start", (0.6, 0.4)),
        ((1, -1, 1), 1, "start", -1),
        ((1, 0, 1), LIMITS.images, "pictures", 2 * LIMITS.images),
    ],
)
def test_requests_beyond_the_limits_are_rejected(given: Sequence[Any], count: int, option: str, wrong: Any) -> None:
    with raises(OptionError, option=option, given=wrong):
        list(
            page.generate(
                Any, ControlAdapter(Path("x"), "canny"), "x", generation("x", count=count), ConditionInput("sketch"), *given
            )
        )  # type: ignore[arg-type]


def test_training_job(context: Context, base: str, tmp_path: Path) -> None:
    assert set(teaching.control_methods()) >= {"controlnet", "t2i_adapter", "controlnext", "ip_adapter"}
    photos = [tmp_path / f"{i}.png" for i in range(2)]
    for number, path in enumerate(photos):
        picture(number, 64).save(path)
    (tmp_path / "bad.png").write_text("no picture")
    here = context.workspace(None)
    files = [*map(str, photos), str(tmp_path / "bad.png")]
    job, refused = teaching.start_job(
        context, here, ControlTrainingRequest("t2i_adapter", "canny", base, 3, files, "--a thing", title="mine")
    )
    assert len(refused) == 1
    words = [*job.command, "--out", str(job.run), "--resume"]
    told = parser_for(words).parse_args(words)
    assert Path(told.data).parent == here.datasets
    assert len(list(Path(told.data).iterdir())) == 2
    assert (told.method, told.condition, told.base, told.steps, told.template) == ("t2i_adapter", "canny", base, 3, "--a thing")
    assert (told.resume, str(told.out), told.tracker) == (True, str(job.run), "none")
    assert job.metadata["title"] == "mine"
    job, _ = teaching.start_job(context, here, ControlTrainingRequest("ip_adapter", "image", "bundled"))
    words = [*job.command, "--out", str(job.run), "--resume"]
    assert parser_for(words).parse_args(words).data is None, "the base draws its own pictures"
    assert [each.metadata["kind"] for each in here.all_jobs()] == ["control", "control"]
    assert control_page._result_values(None)[0].visible is False


def test_presets_have_steps_and_minutes(tmp_path: Path) -> None:
    """The shortest preset was measured to work; the middle one equals the default of the command."""
    here = Workspace(tmp_path)
    assert teaching.preset_lengths("balanced", "controlnet", "bundled") == (800, 384)
    assert teaching.preset_lengths("balanced", "ip_adapter", "bundled")[0] == teaching.default_steps("ip_adapter", "bundled")
    assert teaching.preset_lengths("quick", "controlnet", "bundled")[0] >= 400
    seconds = [
        teaching.expected_seconds("controlnet", "bundled", *teaching.preset_lengths(p, "controlnet", "bundled"))
        for p in teaching.PRESETS
    ]
    assert seconds == sorted(seconds)
    assert all("min" in label for label, _ in teaching.preset_choices("controlnet", "bundled"))
    assert teaching.expected_seconds("controlnet", "another/base", 100, 64) is None
    job = jobs.create_job(
        here.jobs,
        "control",
        "edges",
        ["control", "--method=controlnet", "--base=bundled", "--steps=200", "--generated-images=64"],
    )
    job.run.mkdir()
    (job.run / "result.json").write_text("{}")
    (job.folder / "begun.json").write_text('{"steps": [0]}')
    for name, at in (("process.json", 1000), ("end.json", 2000)):
        (job.folder / name).write_text('{"status": 0}')
        os.utime(job.folder / name, (at, at))
    assert teaching.expected_seconds("controlnet", "bundled", 200, 64, here) == pytest.approx(1000), "as the last run took"
    assert teaching.expected_seconds("controlnet", "bundled", 400, 192, here) > 1500
    assert "about 17 min" in control_page.estimate_text(here, "controlnet", "bundled", 200, 64)
    assert control_page.estimate_text(here, "controlnet", "bundled", None, 64) == ""


def test_invalid_training_requests_leave_no_files(context: Context, base: str, tmp_path: Path) -> None:
    picture(0, 64).save(tmp_path / "one.png")
    stranger = Workspace(context.root, "stranger")
    one, many = [str(tmp_path / "one.png")], ["x"] * (LIMITS.photos + 1)
    cases: tuple[tuple[ControlTrainingRequest, dict[str, Any]], ...] = (
        (ControlTrainingRequest("lora", "canny", base), {"option": "method", "given": "lora"}),
        (ControlTrainingRequest("ip_adapter", "canny", base), {"option": "condition", "given": "canny", "expected": ("image",)}),
        (ControlTrainingRequest("controlnet", "--out=/", base), {"option": "condition", "given": "--out=/"}),
        (ControlTrainingRequest("controlnet", "canny", "--debug"), {"where": "base", "given": "--debug"}),
        (ControlTrainingRequest("controlnet", "canny", base, steps=10**9), {"option": "steps", "given": 10**9}),
        (ControlTrainingRequest("controlnet", "canny", base, generated_images="x"), {"option": "generated images", "given": "x"}),
        (
            ControlTrainingRequest("controlnet", "canny", base, generated_images=10**9),
            {"option": "generated images", "given": 10**9},
        ),
        (
            ControlTrainingRequest("controlnet", "canny", base, photos=one),
            {"option": "photos", "given": 1, "expected": 2},
        ),
        (
            ControlTrainingRequest("controlnet", "canny", base, photos=many),
            {"where": "photos", "given": len(many), "expected": LIMITS.photos},
        ),
    )
    for request, data in cases:
        with raises(VeneerError, **data):
            teaching.start_job(context, stranger, request)
    assert not stranger.all_jobs()
    assert not stranger.datasets.exists() or not list(stranger.datasets.iterdir())


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_page_builds(tmp_path: Path) -> None:
    """Closes event loops that Gradio leaves open."""
    with AppBlocks():
        control_page.PAGE.build(Context.create(tmp_path))
    gc.collect()
