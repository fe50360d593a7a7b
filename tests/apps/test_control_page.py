"""The page Control: what is followed, pictures with and without, what is refused, and jobs that teach."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image, ImageDraw
from veneer.apps import jobs
from veneer.apps.context import Studio
from veneer.apps.limits import LIMITS
from veneer.apps.pages.control import control_page
from veneer.apps.pages.control import generation as page
from veneer.apps.pages.control import training as teaching
from veneer.apps.pages.control.generation import Brought, Follower
from veneer.apps.pages.control.training import Lesson
from veneer.apps.pages.shared.generation_request import Wish
from veneer.apps.pages.shared.images import sketched
from veneer.apps.workspace import Workspace

import veneer
from tests.methods.controls import picture, stir
from tests.raising import raises
from veneer.cli import parser_for
from veneer.control.image_embedding import embedder
from veneer.control.maps.maps import get
from veneer.control.maps.sketch import sketch_map
from veneer.formats import native
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError, UnknownName
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.report.previews import PreviewSettings, previews, read_settings

SIDE = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text('{"steps": 2, "things": ["cat"], "scenes": ["a {thing}"], "training": {}}')
    return str(folder)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, base: str) -> Studio:
    """A studio whose visitor has what follows lines, one that does not say what, one that follows pictures, and a LoRA."""
    studio = Studio.at(tmp_path_factory.mktemp("workspaces"), "cpu")
    folder = studio.workspace(None).adapters
    folder.mkdir(parents=True)
    for name, method, told in (
        ("lines", "t2i_adapter", {"condition": "canny"}),
        ("unsaid", "t2i_adapter", {}),
        ("prompt", "ip_adapter", {"condition": "image"}),
        ("style", "lora", {}),
    ):
        pipe = veneer.base_models.load(base)
        options = {"width": embedder(pipe).width} if name == "prompt" else {}
        attached = veneer.attach(pipe, method, **options)
        for number, (_, adapter) in enumerate(attached.parts.values()):
            stir(adapter, number, 0.3)
        native.save(attached, folder / f"{name}.safetensors", provenance=told)
    return studio


def sketch(mode: str = "RGBA") -> bytes:
    """A square drawn on a transparent sheet."""
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


def wish(base: str, **changed: Any) -> Wish:
    return Wish(**{"base": base, "prompt": "a cat", "steps": 2, "guidance": 4.0, **changed})


def test_who_follows_what(studio: Studio) -> None:
    here = studio.workspace(None)
    assert {name: f.condition for name, f in page.followers(here).items()} == {
        "lines": "canny",
        "prompt": "image",
        "unsaid": None,
    }
    assert page.follower(here, "unsaid", "blur").condition == "blur"
    assert page.follower(here, "lines", "blur").condition == "canny", "what its file says counts"
    for name, condition, data in (
        (None, None, {"option": "control", "given": None}),
        ("../lines", None, {"name": "../lines", "kind": "adapter"}),
        ("style", None, {"option": "control", "given": "style"}),
        ("unsaid", "sepia", {"name": "sepia", "kind": "condition"}),
    ):
        with raises(VeneerError, **data):
            page.follower(here, name, condition)
    with raises(UnknownName, name="lines", kind="adapter"):
        page.follower(Workspace(studio.root, "eve"), "lines")


def test_a_sketch_a_photo_and_a_map(tmp_path: Path) -> None:
    size = (64, 32)
    photo = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(photo).ellipse([60, 40, 140, 120], fill="red")
    photo.save(tmp_path / "p.jpg", quality=95)
    path = str(tmp_path / "p.jpg")
    drawn = page.guide("canny", Brought("sketch", sketch()), size)
    assert np.array_equal(drawn, sketch_map(sketched(sketch("RGB")), "canny", size)), "an empty sheet is white"
    assert drawn.size == size
    made = page.guide("canny", Brought("photo", None, path), size)
    middle = Image.fromarray(pixels(path)).crop((0, 30, 200, 130)).resize(size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(made, int) - np.asarray(get("canny")(middle), int)).mean() < 255 * 0.01
    given = Image.fromarray(np.kron(np.eye(4, dtype=np.uint8), np.full((16, 32), 255, np.uint8))).convert("RGB")
    given.save(tmp_path / "map.png")
    whole = page.guide("canny", Brought("map", None, str(tmp_path / "map.png")), size)
    assert np.array_equal(whole, given.resize(size, Image.Resampling.NEAREST)), "taken as it is"
    assert page.guide("image", Brought("photo", None, path), size).size == (200, 160)
    stripes = Image.new("RGB", (96, 32), "red")
    stripes.paste("blue", (32, 0, 64, 32))
    stripes.save(tmp_path / "stripes.png")
    middle = page.guide("canny", Brought("map", None, str(tmp_path / "stripes.png")), (32, 32))
    assert middle.getcolors() == [(32 * 32, (0, 0, 255))], "the middle of a map of another shape"


def test_the_map_has_the_size_of_the_picture(studio: Studio, base: str) -> None:
    assert page.size_of(studio, wish(base, size=(32, 64))) == (64, 32), "width first"
    assert page.size_of(studio, wish(base)) == (SIDE, SIDE)


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("<html><script>alert(1)</script>")
    empty = png(Image.new("RGBA", (384, 384)))
    no_lines: dict[str, object] = {"where": "sketch", "given": "empty"}
    cases: tuple[tuple[Brought, dict[str, object]], ...] = (
        (Brought("sketch"), no_lines),
        (Brought("sketch", empty), no_lines),
        (Brought("sketch", png(Image.new("RGB", (384, 384), "white"))), no_lines),
        (Brought("sketch", b"GIF8, or not"), {"file": "the sketch", "given": "damaged GIF"}),
        (Brought("sketch", b"\0" * 100), {"file": "the sketch", "given": "unknown"}),
        (Brought("sketch", png(Image.new("1", (6000, 6000)))), {"file": "the sketch", "given": (6000, 6000)}),
        (Brought("photo"), {"option": "picture", "given": None}),
        (Brought("photo", None, str(tmp_path / "x.png")), {"file": "x.png", "given": "HTML"}),
        (Brought("disk"), {"option": "source", "given": "disk"}),
    )
    for given, data in cases:
        with raises(VeneerError, **data) as error:
            page.guide("canny", given, (64, 64))
        assert str(tmp_path) not in str(error.value)
    with raises(OptionError, option="source", given="sketch", expected=("photo",)):
        page.guide("image", Brought("sketch", sketch()), (64, 64))


def test_the_picture_with_without_and_the_map(studio: Studio, base: str) -> None:
    found = page.follower(studio.workspace(None), "lines")
    wanted = wish(base, seed=4)
    given = Brought("sketch", sketch())
    *_, (shown, told) = page.draw(studio, found, "lines", wanted, given, 0.8, 0.0, 0.5)
    assert [caption for _, caption in shown] == ["what is followed", "without, seed 4", "with, seed 4"]
    assert told == "1 of 1"
    guide, without, followed = (pixels(path) for path, _ in shown)
    pipe = veneer.base_models.load(base)
    settings = PreviewSettings((4,), 2, 4.0)
    assert np.array_equal(without, np.asarray(previews(pipe, ["a cat"], settings)[0].image))
    attached = veneer.load(pipe, found.file, scale=0.8)
    with attached.condition(image=sketch_map(sketched(sketch()), "canny", (SIDE, SIDE)), end=0.5, pipeline=pipe):
        assert np.array_equal(followed, np.asarray(previews(pipe, ["a cat"], settings)[0].image))
    assert not np.array_equal(followed, without)
    assert guide.shape == (SIDE, SIDE, 3)
    facts = read_settings(shown[2][0])
    assert (facts["adapters"], facts["end"], facts["condition"]) == ([{"file": "lines", "scale": 0.8}], 0.5, "canny")


def test_a_picture_as_a_prompt(studio: Studio, base: str, tmp_path: Path) -> None:
    picture(1, 64).save(tmp_path / "p.png")
    found = page.follower(studio.workspace(None), "prompt")
    steps = page.draw(studio, found, "prompt", wish(base, count=2), Brought("photo", None, str(tmp_path / "p.png")), 1, 0, 1)
    *_, (shown, _) = steps
    assert len(shown) == 5
    with raises(OptionError, option="picture", given=None):
        list(page.draw(studio, found, "prompt", wish(base), Brought("photo"), 1, 0, 1))


@pytest.mark.parametrize(
    ("given", "count", "option", "wrong"),
    [
        ((9, 0, 1), 1, "strength", 9),
        (("x", 0, 1), 1, "strength", "x"),
        ((1, 0.6, 0.4), 1, "start", (0.6, 0.4)),
        ((1, -1, 1), 1, "start", -1),
        ((1, 0, 1), LIMITS.pictures, "pictures", 2 * LIMITS.pictures),
    ],
)
def test_what_is_beyond_the_limits_is_refused(given: Sequence[Any], count: int, option: str, wrong: Any) -> None:
    with raises(OptionError, option=option, given=wrong):
        list(page.draw(Any, Follower(Path("x"), "canny"), "x", wish("x", count=count), Brought("sketch"), *given))  # type: ignore[arg-type]


def test_a_job_that_teaches(studio: Studio, base: str, tmp_path: Path) -> None:
    assert set(teaching.ways()) >= {"controlnet", "t2i_adapter", "controlnext", "ip_adapter"}
    photos = [tmp_path / f"{i}.png" for i in range(2)]
    for number, path in enumerate(photos):
        picture(number, 64).save(path)
    (tmp_path / "bad.png").write_text("no picture")
    here = studio.workspace(None)
    files = [*map(str, photos), str(tmp_path / "bad.png")]
    job, refused = teaching.begin(studio, here, Lesson("t2i_adapter", "canny", base, 3, files, "--a thing", title="mine"))
    assert len(refused) == 1
    words = [*job.about["words"], "--out", str(job.run), "--resume"]
    told = parser_for(words).parse_args(words)
    assert Path(told.data).parent == here.given
    assert len(list(Path(told.data).iterdir())) == 2
    assert (told.method, told.condition, told.base, told.steps, told.template) == ("t2i_adapter", "canny", base, 3, "--a thing")
    assert (told.resume, str(told.out), told.tracker) == (True, str(job.run), "none")
    assert job.about["title"] == "mine"
    job, _ = teaching.begin(studio, here, Lesson("ip_adapter", "image", "bundled"))
    words = [*job.about["words"], "--out", str(job.run), "--resume"]
    assert parser_for(words).parse_args(words).data is None, "the base draws its own pictures"
    assert [each.about["kind"] for each in here.all_jobs()] == ["control", "control"]
    assert control_page._result(None)[0].visible is False


def test_presets_of_a_control_have_their_steps_and_minutes(tmp_path: Path) -> None:
    """The shortest is one that was measured to follow; the longest what the command does by default."""
    here = Workspace(tmp_path)
    assert teaching.chosen("thorough", "controlnet", "bundled") == (800, 384)
    assert teaching.chosen("thorough", "ip_adapter", "bundled")[0] == teaching.usual_steps("ip_adapter", "bundled")
    assert teaching.chosen("quick", "controlnet", "bundled")[0] >= 200
    seconds = [teaching.expected("controlnet", "bundled", *teaching.chosen(p, "controlnet", "bundled")) for p in teaching.LENGTHS]
    assert seconds == sorted(seconds)
    assert all("min" in label for label, _ in teaching.lengths("controlnet", "bundled"))
    assert teaching.expected("controlnet", "another/base", 100, 64) is None
    job = jobs.make(
        here.jobs, "control", "edges",
        ["control", "--method=controlnet", "--base=bundled", "--steps=200", "--generated-images=64"],
    )  # fmt: skip
    job.run.mkdir()
    (job.run / "result.json").write_text("{}")
    (job.folder / "begun.json").write_text('{"steps": [0]}')
    for name, at in (("process.json", 1000), ("end.json", 2000)):
        (job.folder / name).write_text('{"status": 0}')
        os.utime(job.folder / name, (at, at))
    assert teaching.expected("controlnet", "bundled", 200, 64, here) == pytest.approx(1000), "as the last run took"
    assert teaching.expected("controlnet", "bundled", 400, 192, here) > 1500
    assert "about 17 min" in control_page.estimated(here, "controlnet", "bundled", 200, 64)
    assert control_page.estimated(here, "controlnet", "bundled", None, 64) == ""


def test_what_cannot_be_taught_is_refused_and_leaves_nothing(studio: Studio, base: str, tmp_path: Path) -> None:
    picture(0, 64).save(tmp_path / "one.png")
    stranger = Workspace(studio.root, "stranger")
    one, many = [str(tmp_path / "one.png")], ["x"] * (LIMITS.photos + 1)
    cases: tuple[tuple[Lesson, dict[str, Any]], ...] = (
        (Lesson("lora", "canny", base), {"option": "method", "given": "lora"}),
        (Lesson("ip_adapter", "canny", base), {"option": "condition", "given": "canny", "expected": ("image",)}),
        (Lesson("controlnet", "--out=/", base), {"option": "condition", "given": "--out=/"}),
        (Lesson("controlnet", "canny", "--debug"), {"where": "base", "given": "--debug"}),
        (Lesson("controlnet", "canny", base, steps=10**9), {"option": "steps", "given": 10**9}),
        (Lesson("controlnet", "canny", base, drawn="x"), {"option": "pictures drawn", "given": "x"}),
        (Lesson("controlnet", "canny", base, drawn=10**9), {"option": "pictures drawn", "given": 10**9}),
        (
            Lesson("controlnet", "canny", base, photos=one),
            {"option": "photos", "given": 1, "expected": 2},
        ),
        (Lesson("controlnet", "canny", base, photos=many), {"where": "photos", "given": len(many), "expected": LIMITS.photos}),
    )
    for lesson, data in cases:
        with raises(VeneerError, **data):
            teaching.begin(studio, stranger, lesson)
    assert not stranger.all_jobs()
    assert not stranger.given.exists() or not list(stranger.given.iterdir())


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_page_builds(tmp_path: Path) -> None:
    """Gradio leaves event loops open, which are collected here."""
    with gr.Blocks():
        control_page.PAGE.build(Studio.at(tmp_path))
    gc.collect()
