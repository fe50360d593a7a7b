"""The job view: selection, descriptions, and updates of changed components only."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from filelock import FileLock
from PIL import Image
from veneer.apps import jobs
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context, escape_markup
from veneer.apps.jobs import Job
from veneer.apps.limits import LIMITS
from veneer.apps.pages.shared.job_text import POINTS, describe, loss_curve, progress_bar
from veneer.apps.pages.shared.job_view import (
    ENDED,
    NO_RESULTS,
    Results,
    copy_for_download,
    delete_job,
    job_view,
    refresh,
    resume_job,
)
from veneer.apps.pages.shared.verdict import verdict_html
from veneer.apps.workspace import Workspace

from tests.raising import raises
from veneer.injection import VeneerError
from veneer.injection.errors import StateError, UnknownName
from veneer.training.report.phases import PhaseReport
from veneer.training.report.progress import Progress, ProgressFile

PARTS = ("choice", "state", "progress", "stop", "on", "delete", "loss", "preview", "said", "log")


def event(step: int, steps: int = 40, left: float | None = 8.0) -> Progress:
    return Progress(step, steps, 1.0 / step, 1.0 / step, 1e-3, 1.0, float(step), left, 0)


def teller(job: Job) -> ProgressFile:
    return ProgressFile(job.run / "progress.jsonl", seconds=0)


def seen(
    context: Context, name: str | None = None, before: dict[str, Any] | None = None, results: Results = NO_RESULTS
) -> list[Any]:
    return refresh(context, context.workspace(None), "train", name, before or {}, results, "Nothing yet.")


def is_skip(value: Any) -> bool:
    return isinstance(value, dict) and value == gr.skip()


def test_newest_job_is_selected_and_only_changes_are_sent(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    folder = context.workspace(None).jobs
    empty = seen(context)
    assert empty[1] == "Nothing yet."
    assert not empty[0].visible
    jobs.create_job(folder, "classify", "of another page", ["transfer"])
    old = jobs.create_job(folder, "train", "an old one", ["personalize"])
    new = jobs.create_job(folder, "train", "<b>new</b>", ["personalize"])
    first = seen(context, None, empty[-1])
    assert (first[0].value, [name for _, name in first[0].choices]) == (new.name, [new.name, old.name])
    assert first[1].startswith(f"**{escape_markup('<b>new</b>')}** is queued: 2 jobs are ahead of it.")
    assert all(map(is_skip, seen(context, new.name, first[-1]))), "nothing has changed"

    teller(new)(event(1))
    changed = dict(zip(PARTS, seen(context, new.name, first[-1]), strict=False))
    assert {name for name, value in changed.items() if not is_skip(value)} == {"progress", "loss"}
    assert 'value="1"' in changed["progress"].value
    assert seen(context, old.name)[0].value == old.name, "an older one may be chosen"
    assert seen(context, "../../etc")[0].value == new.name, "a name that is none of the list's is not looked for"


def test_description_of_every_state(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    job = jobs.create_job(context.workspace(None).jobs, "train", "a toy", ["personalize"])
    assert describe(context, job, []) == "**a toy** starts in a moment."
    (job.folder / "log.txt").touch()
    assert describe(context, job, []).startswith("**a toy** starts in a moment. It was interrupted and resumes")
    another = jobs.create_job(Workspace(tmp_path, "anna").jobs, "control", "hers", ["control"])
    with FileLock(another.folder / "lock"):
        assert describe(context, job, []).startswith("**a toy** is queued: 1 job is ahead of it.")
    another.stop()
    job.run.mkdir()
    with FileLock(job.folder / "lock"):
        assert "loads the base model and the data" in describe(context, job, [])
        assert describe(context, job, [event(10)]) == "**a toy** trains: step 10 of 40, about 0:08 left."
        assert "generates images and evaluates" in describe(context, job, [event(40)])
        (job.folder / "stop").touch()
        assert "stops after this step" in describe(context, job, [event(10)])
    assert describe(context, job, [event(10)]) == "**a toy** was stopped after step 10 of 40. Nothing is lost; it can be resumed."
    (job.run / "adapter.safetensors").touch()
    assert "The trained weights are saved" in describe(context, job, [event(10)])
    (job.folder / "end.json").write_text(json.dumps({"status": 1, "why": "no <i>room</i>"}))
    assert describe(context, job, []) == f"**a toy** failed before its first step. {escape_markup('no <i>room</i>')}"
    (job.run / "result.json").write_text("{}")
    assert describe(context, job, [event(40)]) == "**a toy** is done: 40 steps in 0:40."


def test_phases_are_described_with_progress(tmp_path: Path) -> None:
    """Class images, previews and evaluation; training steps are described as before."""
    context = Context.create(tmp_path)
    job = jobs.create_job(context.workspace(None).jobs, "train", "a control", ["control"])
    report = PhaseReport(job.run / "progress.jsonl", seconds=0)
    job.run.mkdir()
    with FileLock(job.folder / "lock"):
        report("class_images", 384)(176)
        words, bar_now = seen(context)[1:3]
        assert "176 of 384, about " in words
        assert 'max="384" value="176"' in bar_now.value
        teller(job)(event(10))
        assert "step 10 of 40" in seen(context)[1]
        assert 'max="40" value="10"' in seen(context)[2].value
        report("evaluating", 12)(3)
        words, bar_now = seen(context)[1:3]
        assert "3 of 12" in words
        assert 'max="12" value="3"' in bar_now.value
        report("saving")
        assert "saves" in seen(context)[1]


@pytest.mark.parametrize("outcome", ["learned", "partly", "not_learned", "overfitted", "unknown"])
def test_unsuccessful_verdict_is_not_shown_as_done(outcome: str, tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    job = jobs.create_job(context.workspace(None).jobs, "train", "a toy", ["personalize"])
    job.run.mkdir()
    result = {
        "verdict": {"outcome": outcome, "summary": "<b>so</b>", "reasons": ["it is"], "advice": ["train longer: --eval-seeds 3"]}
    }
    (job.run / "result.json").write_text(json.dumps(result))
    choice, words = seen(context)[:2]
    assert ("is done" in words) == (outcome in ("learned", "unknown"))
    assert choice.choices[0][0].endswith("done") == (outcome in ("learned", "unknown"))
    html = verdict_html(result)
    assert escape("<b>so</b>") in html
    assert "train longer: eval seeds = 3" in html, "by the names of fields, not of flags"
    assert verdict_html({}) == verdict_html({"verdict": "x"}) == ""


def test_buttons_follow_the_state(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    job = jobs.create_job(context.workspace(None).jobs, "train", "a toy", ["personalize"])

    def visible() -> dict[str, bool]:
        return {name: seen(context)[PARTS.index(name)].visible for name in ("stop", "on", "delete")}

    assert visible() == {"stop": True, "on": False, "delete": False}
    with raises(StateError, where=job.name, given="waiting", expected=ENDED):
        delete_job(context.workspace(None), job.name)
    with raises(StateError, where=job.name, given="waiting", expected=("stopped", "failed")):
        resume_job(context.workspace(None), job.name)
    before = seen(context)[-1]
    job.stop()
    sent = dict(zip(PARTS, seen(context, job.name, before), strict=False))
    assert {name for name, value in sent.items() if not is_skip(value)} == {"choice", "state", "stop", "on", "delete"}
    assert visible() == {"stop": False, "on": True, "delete": True}
    resume_job(context.workspace(None), job.name)
    assert visible() == {"stop": True, "on": False, "delete": False}


def test_deleting_a_job_deletes_its_data_only(tmp_path: Path) -> None:
    context = Context.create(tmp_path / "studio")
    workspace = context.workspace(None)
    given, another, outside = workspace.new_dataset(), workspace.new_dataset(), tmp_path / "outside"
    outside.mkdir()
    words = [
        "personalize",
        str(given),
        "--base",
        str(outside),
        "--where",
        str(workspace.datasets),
        str(workspace.datasets / ".."),
    ]
    job = jobs.create_job(workspace.jobs, "train", "a toy", words)
    job.stop()
    delete_job(workspace, job.name)
    assert (given.exists(), another.exists(), outside.exists(), job.folder.exists()) == (False, True, True, False)
    with raises(UnknownName, name="..", kind="job"):
        delete_job(workspace, "..")


def test_results_update_when_the_stamp_changes(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    results = Results(lambda: [gr.Markdown(), gr.Markdown()], lambda job: [job and job.name, "two"], lambda job: job.previews())
    job = jobs.create_job(context.workspace(None).jobs, "train", "a toy", ["personalize"])
    first = seen(context, None, None, results)
    assert first[-3:-1] == [job.name, "two"]
    again = seen(context, job.name, first[-1], results)
    assert all(map(is_skip, again))
    assert len(again) == len(first)
    (job.run / "previews").mkdir(parents=True)
    (job.run / "previews" / "step-000001.png").touch()
    assert seen(context, job.name, first[-1], results)[-2] == "two"
    with AppBlocks() as page:
        job_view(context, "train", results)
    *events, timer = page.fns.values()
    assert {len(event.outputs) for event in events} == {len(first)}
    assert len(timer.outputs) == 1


def test_selecting_another_job_updates_curve_and_preview(tmp_path: Path) -> None:
    """Both have the same progress, so only their names differ."""
    context = Context.create(tmp_path)
    results = Results(lambda: [gr.Markdown()], lambda job: [job and job.name])
    made = [jobs.create_job(context.workspace(None).jobs, "train", "a toy", ["personalize"]) for _ in range(2)]
    for job, colors in zip(made, (("red", "blue"), ("green", "white")), strict=True):
        tell = teller(job)
        tell(event(1))
        tell(event(2))
        (job.run / "previews").mkdir()
        for number, color in enumerate(colors):
            Image.new("RGB", (8, 8), color).save(job.run / "previews" / f"step-{number:06d}.png")
    first = seen(context, made[0].name, None, results)
    with Image.open(first[PARTS.index("preview")].value["path"]) as shown:
        assert shown.convert("HSV").getchannel("H").getpixel((4, 4)) in range(168, 173), "the newest one is blue"
    second = seen(context, made[1].name, first[-1], results)
    for part in ("loss", "preview"):
        assert not is_skip(second[PARTS.index(part)]), part
    assert second[-2] == made[1].name


def test_resume_respects_the_job_limit(tmp_path: Path) -> None:
    context = Context.create(tmp_path)
    here = context.workspace(None)
    stopped = context.submit(here, "train", "a toy", ["personalize"])
    stopped.stop()
    for _ in range(LIMITS.jobs):
        context.submit(here, "train", "a toy", ["personalize"])
    with raises(VeneerError, where="jobs", expected=LIMITS.jobs):
        resume_job(here, stopped.name)
    assert stopped.state == "stopped"


def test_loss_curve_and_progress_bar() -> None:
    assert loss_curve([event(1)]) is None
    steps = [event(step, 1000) for step in range(1, 1001)]
    table = loss_curve(steps)
    assert len(table) <= POINTS + 1
    assert table["step"].iloc[-1] == 1000
    assert table["loss"].iloc[-1] == pytest.approx(0.001)
    assert progress_bar([]) == ""
    assert 'max="1000" value="7" aria-label="7 of 1000 steps, 0:08 left"' in progress_bar(steps[:7])


def test_downloads_are_copies(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (copy,) = copy_for_download([tmp_path / "a.txt", tmp_path / "none.txt"])
    assert Path(copy).parent != tmp_path
    assert Path(copy).read_text() == "a"
    assert copy_for_download([]) == []
    (tmp_path / "adapter.safetensors").write_text("b")
    named = copy_for_download([tmp_path / "adapter.safetensors", tmp_path / "a.txt"], "my <toy>")
    assert [Path(path).name for path in named] == ["my-toy.safetensors", "a.txt"], "all jobs have a file of that name"
