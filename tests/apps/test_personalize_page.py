"""The page Train: photos that are looked at, forms of methods, and a run from the example to its files."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.jobs import Job
from veneer.apps.limits import LIMITS
from veneer.apps.pages.generate import generate_page
from veneer.apps.pages.personalize import personalize_page
from veneer.apps.pages.personalize.request import (
    SETTINGS,
    PersonalizeRequest,
    command,
    estimate,
    options_of,
    parameters,
    preset_settings,
)
from veneer.apps.pages.shared.config_form import Slots, fields_of, flags_of
from veneer.apps.pages.shared.dry_run import dry_run
from veneer.apps.pages.shared.photo_upload import inspect_photos, save_photos
from veneer.apps.pages.shared.training_result import export_kohya
from veneer.apps.pages.shared.verdict import read_result

from tests.methods.controls import picture
from tests.raising import raises, warns
from veneer import formats, methods
from veneer.base_models.folders import BaseModelError
from veneer.cli import parser_for
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.image_io import DataWarning
from veneer.training.data.photo_folder import find_photos

PATIENCE = 300


def asked(
    concept: str = "<toy>", base: str = "bundled", method: str = "lora", options: Sequence[Any] | None = None, **more: str
) -> PersonalizeRequest:
    settings = [more.get(field.name, field.default if field.kind == "check" else "") for field in SETTINGS]
    none = [field.default if field.kind == "check" else "" for field in options_of(method)]
    return PersonalizeRequest(concept, "toy", base, method, settings, none if options is None else options)


def option(method: str, **given: Any) -> list[Any]:
    return [given.get(f.name, f.default if f.kind == "check" else "") for f in options_of(method)]


def test_photos_are_inspected_and_saved(tmp_path: Path) -> None:
    (tmp_path / "brought").mkdir()
    paths = [str(tmp_path / "brought" / name) for name in ("../brought/a b.png", "copy.png", "text.png", "tiny.png")]
    picture(0, 96).save(paths[0])
    picture(0, 96).save(paths[1])
    Path(paths[2]).write_text("<script>")
    picture(1, 96).resize((20, 30)).save(paths[3])
    found = inspect_photos(paths, 64)
    assert found.names == ["001-a-b.png", "002-copy.png", "004-tiny.png"]
    assert [crop.size for crop in found.crops] == [(64, 64)] * 3
    said = "\n".join(found.problems)
    assert "text.png" in said
    assert "001-a-b.png, 002-copy.png" in said
    assert "004-tiny.png (20 x 30)" in said
    assert str(tmp_path) not in said

    workspace = Context.create(tmp_path / "studio").workspace(None)
    captions = [["001-a-b.png", " a {concept}\non grass"], ["../../x.png", "elsewhere"], ["004-tiny.png", ""]]
    folder = save_photos(workspace, paths, captions)
    assert folder.parent == workspace.datasets
    with warns(DataWarning, where="copies", given=("001-a-b.png", "002-copy.png")):
        photos = find_photos(folder)
    assert [photo.caption for photo in photos] == ["a {concept} on grass", None, None]
    with raises(OptionError, option="caption of 001-a-b.png", given=5000, expected=LIMITS.text):
        save_photos(workspace, paths, [["001-a-b.png", "x" * 5000]])
    assert list(workspace.datasets.iterdir()) == [folder], "nothing is left of what was refused"


@pytest.mark.parametrize("name", methods.names())
def test_form_defaults_of_every_method_are_valid_flags(name: str) -> None:
    """The initial values of a form are equivalent to the defaults."""
    method: Any = methods.get(name)
    fields = fields_of(method)
    given = [f.default if f.kind == "check" else str(f.default) if f.kind == "choice" and f.default else "" for f in fields]
    found = flags_of(method, fields, given, name)
    assert all(word.startswith(f"--{name.replace('_', '-')}.") for word in found)
    assert all(field.help for field in fields), "each option is explained"


def test_form_values_reach_the_command_unchanged(tmp_path: Path) -> None:
    options = option("lora", rank="4", by_site="mlp.*:rank=2,alpha=3 conv:rank=3", rslora=True, init="gaussian", alpha="-1.5")
    found = command(asked("--out /etc <toy>", steps="20", where="attn xattn", buckets=False, options=options), tmp_path)  # type: ignore[arg-type]
    read = vars(parser_for(found).parse_args(found))
    assert (read["photos"], read["concept"], read["steps"]) == (tmp_path, "--out /etc <toy>", 20)
    assert (read["where"], read["buckets"], read["lora.rank"], read["lora.alpha"]) == (["attn", "xattn"], False, 4, -1.5)
    assert dict(read["lora.by_site"]) == {"mlp.*": {"rank": 2, "alpha": 3}, "conv": {"rank": 3}}
    assert (read["lora.rslora"], read["lora.init"]) == (True, "gaussian")
    assert "out" not in read


@pytest.mark.parametrize(
    ("name", "text", "data"),
    [
        ("concept", " ", {"given": ""}),
        ("steps", "many", {"given": "many"}),
        ("learning_rate", "fast", {"given": "fast"}),
        ("batch", "0", {"given": 0, "expected": 1}),
        ("steps", "-3", {"given": -3, "expected": 1}),
        ("learning_rate", "0", {"given": 0.0, "expected": 0}),
        ("eval_seeds", "-1", {"given": -1, "expected": 0}),
        ("where", "attn --out /etc", {"given": "attn --out /etc"}),
        ("batch", "65", {"given": 65, "expected": 64}),
        ("resolution", "4096", {"given": 4096, "expected": 1024}),
    ],
)
def test_invalid_settings_are_rejected_before_anything_is_written(
    name: str, text: str, data: dict[str, object], tmp_path: Path
) -> None:
    context = Context.create(tmp_path)
    with raises(OptionError, option=name, **data):
        personalize_page.start_job(context, context.workspace(None), [], [], asked(**{name: text}))
    assert not context.workspace(None).folder.exists()


def test_invalid_base_options_and_photos_are_rejected(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    with raises(BaseModelError, where="base", given="../nowhere/at/all"):
        personalize_page.start_job(context, context.workspace(None), [], [], asked(base="../nowhere/at/all"))
    assert not context.workspace(None).folder.exists()
    with raises(OptionError, option="lora.init", given="sharp"):
        command(asked(options=option("lora", init="sharp")), tmp_path)
    with raises(VeneerError, where="photos", given=0):
        personalize_page.start_job(context, context.workspace(None), [], [], asked())


def test_presets_and_slots() -> None:
    quick, balanced = preset_settings("quick", "bundled", "lora"), preset_settings("balanced", "bundled", "lora")
    assert (balanced["steps"], balanced["batch"], balanced["learning_rate"]) == ("300", "4", "0.002")
    assert int(quick["steps"]) == 100
    with AppBlocks():
        slots = Slots.build([fields_of(methods.get(name)) for name in ("lora", "glora")])
    fields = options_of("glora")
    shown = [part for part in slots.fill(fields, {"rank": 3}) if part.visible]
    assert sorted(part.label for part in shown) == sorted(field.label for field in fields)
    assert next(part.value for part in shown if part.label == "rank") == "3"
    values = [part.value for part in slots.fill(fields, {"rank": 3})]
    assert dict(zip((f.name for f in fields), slots.entries(fields, values), strict=True))["rank"] == "3"


def test_form_must_match_the_selection() -> None:
    personalize_page.check_form_is_current(["quick", "bundled", "lora"], ["quick", "bundled", "lora"])
    with raises(VeneerError, where="settings", expected=("balanced", "bundled", "lora")):
        personalize_page.check_form_is_current(["quick", "bundled", "lora"], ["balanced", "bundled", "lora"])
    with raises(VeneerError, where="settings", expected=("quick", "bundled", "sepia")):
        personalize_page.check_form_is_current(["quick", "bundled", "lora"], ["quick", "bundled", "sepia"])
    with raises(BaseModelError, where="base", given="no/such/folder"):
        personalize_page.check_form_is_current(["quick", "bundled", "lora"], ["quick", "no/such/folder", "lora"])


def test_initial_form_shows_the_default_method() -> None:
    """No update is sent after loading, which could overwrite the user's selection."""
    with AppBlocks():
        slots = Slots.build([fields_of(methods.get(name)) for name in ("lora", "glora")], options_of("pivotal"), {"rank": 16})
    filled = slots.fill(options_of("pivotal"), {"rank": 16})
    for part, later in zip(slots.components, filled, strict=True):
        assert part.visible == later.visible
        assert not later.visible or (part.label, part.value) == (later.label, later.value)


def test_page_builds(tmp_path: Path) -> None:
    with AppBlocks() as page:
        personalize_page.build(Context.create(tmp_path))
    parts = [block for block in page.blocks.values() if isinstance(block, gr.components.FormComponent | gr.Image | gr.File)]
    assert all(part.label for part in parts)


def until_ended(context: Context, job: Job) -> None:
    end = time.monotonic() + PATIENCE
    while job.state in ("waiting", "running"):
        assert time.monotonic() < end, job.log()
        context.queue.start_next()
        time.sleep(0.1)


def test_train_on_the_example_photos(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    context = Context.create(tmp_path / "studio")
    workspace = context.workspace(None)
    paths, concept, word, *_, table = personalize_page.show_example("bundled")
    assert len(paths) == 5
    assert estimate(workspace, base, "lora", "4", "2").startswith("Estimate: the time is known after the first steps.")
    rows = table.value["data"] if isinstance(table.value, dict) else table.value.values.tolist()
    generation = asked(concept, base, steps="4", batch="2", preview_every="2", eval_seeds="0", options=option("lora", rank="2"))
    job = personalize_page.start_job(context, workspace, paths, rows, generation)
    assert word
    until_ended(context, job)
    assert job.state == "done", job.log()
    assert len(job.previews()) == 2
    sheet, said, offered, button, _, pairs, sheet_part, purposes, card, _, onward = personalize_page.result_values(job)
    assert onward.visible, "Generate with it"
    filled = generate_page.form_for_job(workspace, job)
    assert filled[0] == base
    assert "<octopus>" in filled[1], "a prompt with its token"
    assert filled[9].value == [next(iter(workspace.all_adapters()))], "its adapter is selected"
    assert sheet.visible
    assert button.visible
    assert "4 steps in" in said.value
    assert pairs.value.count('class="pair"') == len(read_result(job)["samples"]) > 0, "before and after of each prompt"
    assert (sheet_part.visible, sheet_part.open) == (True, False), "the pairs are shown instead"
    assert card.visible
    assert "<dt>pytorch_lora_weights.safetensors</dt><dd>for diffusers" in purposes.value
    assert "<dt>config.toml</dt><dd>to repeat the run" in purposes.value
    (kohya,) = export_kohya(workspace, job.name)
    assert Path(kohya).name == "octopus-lora-comfyui-a1111.safetensors"
    assert isinstance(formats.format_of(formats.read(kohya)), formats.formats.get("kohya"))
    assert "in all, based on your last run" in estimate(workspace, base, "lora", "4", "2")
    assert offered.visible


def test_dry_run(tmp_path: Path) -> None:
    """Measured memory and time, warnings, and errors of the command."""
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    workspace = Context.create(tmp_path / "studio").workspace(None)
    paths, _, _, *_ = personalize_page.show_example("bundled")
    generation = asked(
        "<toy>", str(tmp_path / "base"), steps="40", batch="2", learning_rate="0.5", preview_every="0", eval_seeds="0"
    )
    said = dry_run(workspace, paths, [], generation)
    assert said.startswith("photos: 5")
    assert re.search(r"cost: time about \d+:\d\d on .*, 40 steps × [\d.e-]+ s", said)
    assert re.search(r"memory about [\d.]+ MiB", said)
    assert "learning rate" in said, "a thousand times the default"
    assert not [*workspace.datasets.iterdir()]
    assert not workspace.all_jobs()
    with raises(VeneerError, where="check") as caught:
        dry_run(workspace, paths, [["001-01.png", "a {concept} " + "and more " * 90]], generation)
    assert any(line.startswith("- prompt: ") for line in caught.value.given)
    assert not [*workspace.datasets.iterdir()]


def test_parameters_of_a_base(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "base")
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert parameters(str(tmp_path / "base")) == sum(p.numel() for part in parts for p in part.parameters())
    assert parameters("somebody/something") == 0


def test_crops_are_centered(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    image.save(tmp_path / "wide.png")
    (crop,) = inspect_photos([str(tmp_path / "wide.png")], 64).crops
    assert crop.getpixel((32, 32)) == (0, 0, 255)
    assert crop.getpixel((3, 32)) == (0, 0, 255)
