"""How a classifier's job goes, and what came of it, as the page Classify shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.classification.train.epoch_selection import Epoch, read_epochs

from ...context import escaped
from ...jobs import Job, find
from ...workspace import shown
from ..shared.html import table
from ..shared.job_text import STATES
from ..shared.job_view import offered, picture, sheet_picture
from ..shared.verdict import verdict

HEIGHT = 420
"""Of the figures that stand side by side, in pixels."""
SHEETS = {"confusion": "Confusion matrix", "curves": "Loss and accuracy", "mistakes": "Most confident mistakes"}
ASKED = ("adapter.safetensors", "model.json")
"""What `veneer predict` needs; offered for download."""
HEAD = ("method", "accuracy", "95 % interval", "best epoch", "parameters", "bytes", "model")
FEW = 16
"""Epochs up to which the axis has a mark for each; an axis of numbers would have half epochs."""


def parts(trial: Callable[[], list[Any]] = list) -> list[Any]:
    """The components below a job, in the order of `values`; those of `trial` are the second and following ones."""
    words = gr.Markdown("", elem_id="classify-words")
    tried = trial()
    accuracy = gr.LinePlot(
        None, "epoch", "accuracy, %", label="Validation accuracy", visible=False, height=240,
        min_width=280, y_lim=[0, 100], buttons=[], elem_id="classify-accuracy",
    )  # fmt: skip
    compared = gr.HTML("", label="All methods on these images", elem_id="classify-compared")
    with gr.Row():
        sheets = [sheet_picture(SHEETS[name], elem_id=f"classify-{name}", height=HEIGHT) for name in ("confusion", "curves")]
    sheets.append(sheet_picture(SHEETS["mistakes"], elem_id="classify-mistakes"))
    earlier = gr.HTML("", label="All your runs", elem_id="classify-runs")
    files = gr.File(label="Files: the classifier and how to load it", file_count="multiple", interactive=False, visible=False)
    return [words, *tried, accuracy, compared, *sheets, earlier, files]


def values(job: Job | None) -> list[Any]:
    """What `parts` show of a job."""
    epochs = read_epochs(job.run) if job else []
    kept = [job.run / name for name in ASKED] if job else []
    done = job is not None and job.state == "done"
    sheets = [
        gr.Image(value=found, visible=done and found is not None)
        for found in (picture(job.run / f"{name}.png") if job else None for name in SHEETS)
    ]
    return [
        told(job, epochs),
        gr.LinePlot(accuracies(epochs), visible=len(epochs) > 1, sort=[str(e.epoch) for e in epochs] or None),
        comparison(job),
        *sheets,
        runs(job),
        gr.File(value=offered(kept), visible=any(path.exists() for path in kept)),
    ]


def stamp(job: Job) -> Any:
    """Changes when any of `values` does, and costs a few looks at files."""
    looked = [_time(job.run / name) for name in ("curve.json", "result.json", *ASKED)]
    return (job.state, *looked, sum(1 for _ in job.folder.parent.glob("*/run/result.json")))


def accuracies(epochs: Sequence[Epoch]) -> Any:
    """A table of validation accuracy by epoch; None while there are no two."""
    import pandas as pd

    if len(epochs) < 2:
        return None
    marks = [e.epoch for e in epochs] if len(epochs) > FEW else [str(e.epoch) for e in epochs]
    return pd.DataFrame({"epoch": marks, "accuracy, %": [round(100 * e.val_accuracy, 2) for e in epochs]})


def told(job: Job | None, epochs: Sequence[Epoch]) -> str:
    """A job's accuracy so far, or in the end, in plain words, as Markdown."""
    if job is None:
        return ""
    if job.state == "done":
        return outcome(result(job))
    if not epochs:
        return ""
    last, best = epochs[-1], min(epochs, key=lambda e: (-e.val_accuracy, e.val_loss, e.step))
    so_far = f"Epoch {last.epoch}: validation accuracy **{last.val_accuracy:.1%}**."
    better = "" if best is last else f" The best so far is epoch {best.epoch}, {best.val_accuracy:.1%}; the best one is kept."
    return f"{so_far}{better} The test images are evaluated once, at the end."


def outcome(found: dict[str, Any]) -> str:
    """The scores of a finished run in plain words, the verdict first, as Markdown."""
    if not found:
        return ""
    low, high = found["test_interval_95"]
    confusion, data = found["test"]["confusion"], found["data"]
    tested, chosen = data["pictures"]["test"], found["chosen"]
    guess = max(map(sum, confusion)) / max(tested, 1)
    notes = [f"- {escaped(str(note))}" for note in data["notes"][:5]]
    lines = [
        verdict(found),
        f"### Accuracy {found['test_accuracy']:.1%}",
        f"Measured on {tested:,} test images that were not used for training. The 95 % interval is **{low:.1%} to {high:.1%}** "
        f"(fewer test images make it wider). Always answering the most frequent class has {guess:.1%}.",
        f"Trained on {data['pictures']['train']:,} images of {len(data['classes']):,} classes. Epoch {chosen['epoch']} was "
        f"kept, the best on {data['pictures']['validation']:,} validation images ({found['val_accuracy']:.1%}). "
        f"{found['trainable_parameters']:,} trainable parameters; the file has {found['stored_bytes']:,} bytes.",
    ]
    return "\n\n".join([*filter(None, lines), *(["About the images:\n\n" + "\n".join(notes)] if notes else [])])


def runs(job: Job | None) -> str:
    """A table of all runs of this page, the newest first; nothing for fewer than two."""
    if job is None:
        return ""
    every = [other for other in find(job.folder.parent) if other.about.get("kind") == "classify"]
    if len(every) < 2:
        return ""
    rows = []
    for other in every:
        found = result(other)
        accuracy = f"{found['test_accuracy']:.1%}" if found else STATES[other.state]
        rows.append((f"{shown(other.title)}{' (above)' if other.name == job.name else ''}", other.when, accuracy))
    return table("All your runs, the newest first: choose one in the list “Job” above", ("run", "started", "accuracy"), rows)


def comparison(job: Job | None) -> str:
    """A table of the finished jobs on the same pictures, the best on validation pictures first; nothing for fewer than two."""
    if job is None:
        return ""
    same = [other for other in find(job.folder.parent) if _data(other) == _data(job) and other.state == "done"]
    found = sorted(((r, other) for other in same if (r := result(other))), key=lambda each: -each[0]["val_accuracy"])
    if len(found) < 2:
        return ""
    told = table("All methods on these images", HEAD, [_row(r) for r, _ in found])
    apart = "<p>Where the intervals of two methods overlap, the difference may be chance: try other seeds, or more images.</p>"
    return told + apart


def _row(found: dict[str, Any]) -> list[object]:
    low, high = found["test_interval_95"]
    return [
        found["config"]["method"], f"{found['test_accuracy']:.1%}", f"{low:.1%} to {high:.1%}", found["chosen"]["epoch"],
        found["trainable_parameters"], found["stored_bytes"], found["model"]["name"],
    ]  # fmt: skip


def result(job: Job) -> dict[str, Any]:
    """What a finished job has found; nothing if that cannot be read."""
    try:
        found = json.loads((job.run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "test_interval_95" in found else {}


def _data(job: Job) -> Any:
    """Of which pictures it learns, and how they are split."""
    words = job.about.get("words", [])
    return words[1] if job.about.get("kind") == "classify" and len(words) > 1 else job.name


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
