"""Requests of the page Train: limits, presets, estimates and forms."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from veneer.apps import jobs
from veneer.apps.context import Context, escape_markup
from veneer.apps.jobs import Job
from veneer.apps.limits import LIMITS
from veneer.apps.pages.personalize import personalize_page
from veneer.apps.pages.personalize.request import (
    FROM_CONCEPT,
    SETTINGS,
    PersonalizeRequest,
    command,
    estimate,
    options_of,
    parameters,
    preset_choices,
    preset_settings,
)
from veneer.apps.pages.shared.config_form import DEFAULT, fields_of, flags_of
from veneer.apps.pages.shared.photo_upload import inspect_photos
from veneer.apps.pages.shared.time_estimates import Timing, duration, measure_timing
from veneer.apps.pages.shared.training_result import summarize
from veneer.apps.workspace import Workspace

from tests.methods.controls import picture
from tests.raising import raises
from veneer import methods
from veneer.base_models.quantized_linear import KINDS
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.loop.config import PRESETS
from veneer.training.preflight.estimates import size
from veneer.training.report.progress import Progress, ProgressFile


def asked(**given: str) -> PersonalizeRequest:
    settings = [given.get(field.name, field.default if field.kind == "check" else "") for field in SETTINGS]
    options = [field.default if field.kind == "check" else "" for field in options_of("lora")]
    return PersonalizeRequest("<toy>", "toy", "bundled", "lora", settings, options)


@pytest.mark.parametrize("value", ["/etc/passwd.gguf", "unet=nf4", "nf5"])
def test_quantization_is_one_of_the_kinds(value: str, tmp_path: Path) -> None:
    """In particular no file of the server."""
    assert command(asked(quantize="nf4"), tmp_path)[-3:] == ["--quantize", "nf4", "--tracker=none"]
    with raises(OptionError, option="quantize", given=value, expected=tuple(KINDS)):
        command(asked(quantize=value), tmp_path)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("resolution", LIMITS.side), ("class_images", LIMITS.images * 16), ("batch", LIMITS.photos),
        ("eval_seeds", LIMITS.images),
    ],
)  # fmt: skip
def test_settings_are_limited(name: str, most: int, tmp_path: Path) -> None:
    assert f"--{name.replace('_', '-')}={most}" in command(asked(**{name: str(most)}), tmp_path)
    for more in ({}, {"where": f"{name.replace('_', '-')}=1"}):
        with raises(OptionError, option=name, given=most + 1, expected=most):
            command(asked(**{name: str(most + 1), **more}), tmp_path)


def test_rejected_requests_leave_no_photos(tmp_path: Path) -> None:
    context, space = Context.create(tmp_path / "root"), Workspace(tmp_path / "root")
    picture(0, 96).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    with raises(VeneerError, where="photos", given=0):
        personalize_page.start_job(context, space, [str(tmp_path / "b.png")], [], asked())
    for _ in range(LIMITS.jobs):
        personalize_page.start_job(context, space, [str(tmp_path / "a.png")], [], asked())
    with raises(VeneerError, where="jobs", expected=LIMITS.jobs):
        personalize_page.start_job(context, space, [str(tmp_path / "a.png")], [], asked())
    assert {str(folder) for folder in space.datasets.iterdir()} == {job.command[1] for job in space.all_jobs()}


def test_photo_problems_omit_folders(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{n}.png") for n in range(2)]
    for path in paths:
        picture(0, 40).save(path)
    said = inspect_photos(paths, 64).problems
    assert any("001-0.png" in each for each in said)
    assert not any("/" in each for each in said), said


def test_presets_differ_in_steps() -> None:
    steps = [int(preset_settings(preset, "bundled", "lora")["steps"]) for preset in ("quick", "balanced", "thorough")]
    assert steps == [steps[1] // 3, steps[1], 2 * steps[1]]


def test_presets_have_time_estimates(tmp_path: Path) -> None:
    """From the reference for the bundled model, then from the last run; none for an unknown base model without a run."""
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    base, space = str(tmp_path / "base"), Workspace(tmp_path / "space")
    assert all("min" in label and preset in label for label, preset in preset_choices("bundled", "pivotal"))
    assert [label for label, _ in preset_choices(base, "lora", space)] == [
        f"{p}: {preset_settings(p, base, 'lora')['steps']} steps" for p in PRESETS
    ]
    job = finished(space, base, "lora", 40.0, 1, 1000)
    (job.folder / "begun.json").write_text('{"steps": [0]}')
    for name, seconds in (("process.json", 1000), ("end.json", 1640)):
        (job.folder / name).write_text('{"status": 0}')
        os.utime(job.folder / name, (seconds, seconds))
    assert job.seconds == 640
    steps = int(preset_settings("balanced", base, "lora")["steps"]) * int(preset_settings("balanced", base, "lora")["batch"])
    labels = {preset: label for label, preset in preset_choices(base, "lora", space)}
    assert labels["balanced"].endswith(duration(4.0 * steps + 600))


def test_every_preset_evaluates_enough_for_a_verdict(tmp_path: Path) -> None:
    """One image per prompt gives no intervals; estimates include the evaluation images of the last run."""
    assert all(int(preset_settings(preset, "bundled", "pivotal")["eval_seeds"]) >= 2 for preset in PRESETS)
    timing = Timing(0.0, 600.0, "")
    assert timing.seconds(0, 2 / 3) == pytest.approx(500)
    job = finished(Workspace(tmp_path), "bundled", "pivotal", 50.0, 1, 1)
    found = measure_timing(job, 1, 2 / 3)
    assert found
    assert found.seconds(0, 2 / 3) == pytest.approx(0.3 * 50)
    few, many = (estimate(None, "bundled", "pivotal", "1000", "4", eval_seeds=n) for n in ("0", "60"))
    assert few != many


def test_options_derived_from_the_concept_are_hidden() -> None:
    for method in ("textual_inversion", "lora"):
        assert not {field.name for field in options_of(method)} & set(FROM_CONCEPT)


def test_default_values_give_no_flags(tmp_path: Path) -> None:
    for name in ("lora", "oft"):
        fields = options_of(name)
        given = [field.default if field.kind == "check" else DEFAULT for field in fields]
        assert flags_of(methods.get(name), fields, given, name) == []
    assert command(asked(batch=DEFAULT, resolution=DEFAULT), tmp_path) == command(asked(), tmp_path), (
        "as the field's own hint says it"
    )


def test_form_text_is_limited() -> None:
    fields = [field for field in options_of("lora") if field.name == "init" or field.kind == "text"]
    for wrong, expected in (("x" * (LIMITS.text + 1), LIMITS.text), ("4\0", "plain text")):
        with raises(OptionError, expected=expected):
            flags_of(methods.get("lora"), fields, [wrong] + [""] * (len(fields) - 1), "lora")


def test_summary_of_a_finished_run(tmp_path: Path) -> None:
    job = finished(Workspace(tmp_path), "bundled", "lora", 65.0, 1, 1234)
    assert "1,234 trainable parameters." in summarize(job), "what is not known is no error"
    found = json.loads((job.run / "result.json").read_text())
    means = {"adapted": {"mean": 0.75}, "base": {"mean": 0.25}}
    found["metrics"] = {"similarity": means, "ceiling": {"mean": 0.875}, "prompt_similarity": means, "drift": {"mean": 0.125}}
    found["training"] = {"steps": 10, "seconds": 65, "warnings": ["<b>*loud*</b>"]}
    (job.run / "result.json").write_text(json.dumps(found))
    told = summarize(job)
    assert "10 steps in 1:05" in told
    assert "**0.75** with the adapter, 0.25 without (1 means identical; between your photos 0.88)" in told
    assert "Similarity to the prompt: 0.75 with the adapter, 0.25 without" in told
    assert "other subjects: 0.12 (0 means none)" in told
    assert escape_markup("<b>*loud*</b>") in told
    assert "<b>" not in told


@dataclass
class Config:
    """A command's settings.

    Args:
        shifts: some numbers.
    """

    shifts: tuple[float, ...] = ()


def test_negative_numbers_are_not_flags() -> None:
    fields = fields_of(Config)
    assert flags_of(Config, fields, ["-1, 2.5 -0.5"]) == ["--shifts", "-1", "2.5", "-0.5"]
    for flag in ("--shifts", "1 -x", "1 --out=/etc"):
        with raises(OptionError, option="shifts", given=flag):
            flags_of(Config, fields, [flag])


def finished(space: Workspace, base: str, method: str, seconds: float, batch: int, trained: int) -> Job:
    """A job of 10 steps."""
    job = jobs.create_job(space.jobs, "train", "a toy", ["personalize", f"--base={base}", f"--method={method}"])
    ProgressFile(job.run / "progress.jsonl", seconds=0)(Progress(10, 10, 1.0, 1.0, 1e-3, 1.0, seconds, None, 0))
    told: dict[str, Any] = {"config": {"batch": batch}, "methods": [{"parameters": trained}]}
    (job.run / "result.json").write_text(json.dumps(told))
    return job


def test_estimates_use_the_last_similar_run(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    base, space = str(tmp_path / "base"), Workspace(tmp_path / "space")
    memory = f"about {size(4 * parameters(base))} for the base"
    assert memory in estimate(space, base, "lora", "20", "2"), "4 bytes a value"
    assert "is known after the first steps" in estimate(space, base, "lora", "20", "2")
    finished(space, base, "lora", 40.0, 2, 1000)
    finished(space, base, "oft", 1000.0, 1, 10)  # newer, but another method
    finished(space, "elsewhere", "lora", 5000.0, 1, 10)
    told = estimate(space, base, "lora", "20", "6")
    assert "about 4 min in all" in told, "twice the steps, three times the images of each: 40 s × 2 × 3, and the rest"
    assert f"{memory}" in told
    assert f"and {size(16 * 1000)} for the trained parameters" in told, "value, gradient and two states, each 4 bytes"
    assert "is known after the first steps" in estimate(space, base, "lora", "²", "1"), "no number that can be read"
    assert "about 22 min in all" in estimate(space, base, "dora", "10", "1"), "of the base's runs the newest"
