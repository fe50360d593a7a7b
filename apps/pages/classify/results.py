"""Progress and results of classifier runs on the page Classify."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.classification.train.epoch_selection import Epoch, read_epochs

from ...context import escape_markup
from ...jobs import Job, find_jobs
from ...workspace import printable
from ..shared.html import table
from ..shared.job_text import STATES
from ..shared.job_view import copy_for_download, grid_image, open_image
from ..shared.verdict import verdict_html

HEIGHT = 420
"""Height in pixels of the figures shown side by side."""
FIGURES = {"confusion": "Confusion matrix", "curves": "Loss and accuracy", "mistakes": "Most confident mistakes"}
CLASSIFIER_FILES = ("adapter.safetensors", "model.json")
"""Files that `veneer predict` needs; available for download."""
COLUMNS = ("method", "accuracy", "95 % interval", "best epoch", "trainable parameters", "bytes", "model")
FEW_EPOCHS = 16
"""Up to this many epochs the axis is categorical, since a numeric axis would show half epochs."""


def result_components(extra: Callable[[], list[Any]] = list) -> list[Any]:
    """Result components of a job, in the order of `result_values`; those of `extra` follow the first."""
    words = gr.Markdown("", elem_id="classify-words")
    extra_components = extra()
    accuracy = gr.LinePlot(
        None, "epoch", "accuracy, %", label="Validation accuracy", visible=False, height=240,
        min_width=280, y_lim=[0, 100], buttons=[], elem_id="classify-accuracy",
    )  # fmt: skip
    compared = gr.HTML("", label="All methods on these images", elem_id="classify-compared")
    with gr.Row():
        figures = [grid_image(FIGURES[name], elem_id=f"classify-{name}", height=HEIGHT) for name in ("confusion", "curves")]
    figures.append(grid_image(FIGURES["mistakes"], elem_id="classify-mistakes"))
    earlier = gr.HTML("", label="All your runs", elem_id="classify-runs")
    files = gr.File(
        label="Files: the classifier and how to load it", file_count="multiple", interactive=False, visible=False,
        elem_classes="downloads", elem_id="classify-files",
    )  # fmt: skip
    return [words, *extra_components, accuracy, compared, *figures, earlier, files]


def result_values(job: Job | None) -> list[Any]:
    """Values of `result_components` for a job."""
    epochs = read_epochs(job.run) if job else []
    files_ = [job.run / name for name in CLASSIFIER_FILES] if job else []
    done = job is not None and job.state == "done"
    curves = job is not None and done and (job.run / "curves.png").exists()  # they show the accuracy as well
    figures = [
        gr.Image(value=image, visible=done and image is not None)
        for image in (open_image(job.run / f"{name}.png") if job else None for name in FIGURES)
    ]
    return [
        describe(job, epochs),
        gr.LinePlot(accuracy_curve(epochs), visible=len(epochs) > 1 and not curves, sort=[str(e.epoch) for e in epochs] or None),
        comparison(job),
        *figures,
        run_table(job),
        gr.File(value=copy_for_download(files_), visible=any(path.exists() for path in files_)),
    ]


def stamp(job: Job) -> Any:
    """Cache key of `result_values` from file times."""
    times = [_mtime(job.run / name) for name in ("curve.json", "result.json", *CLASSIFIER_FILES)]
    return (job.state, *times, sum(1 for _ in job.folder.parent.glob("*/run/result.json")))


def accuracy_curve(epochs: Sequence[Epoch]) -> Any:
    """Table of validation accuracy by epoch; None with fewer than two epochs."""
    import pandas as pd

    if len(epochs) < 2:
        return None
    marks = [e.epoch for e in epochs] if len(epochs) > FEW_EPOCHS else [str(e.epoch) for e in epochs]
    return pd.DataFrame({"epoch": marks, "accuracy, %": [round(100 * e.val_accuracy, 2) for e in epochs]})


def describe(job: Job | None, epochs: Sequence[Epoch]) -> str:
    """Accuracy of a job so far, or its final summary, in Markdown."""
    if job is None:
        return ""
    if job.state == "done":
        return summarize(read_result(job))
    if not epochs:
        return ""
    last, best = epochs[-1], min(epochs, key=lambda e: (-e.val_accuracy, e.val_loss, e.step))
    so_far = f"Epoch {last.epoch}: validation accuracy **{last.val_accuracy:.1%}**."
    better = "" if best is last else f" The best so far is epoch {best.epoch}, {best.val_accuracy:.1%}; its weights are saved."
    return f"{so_far}{better} The test images are evaluated once, at the end."


def summarize(result: dict[str, Any]) -> str:
    """Verdict and metrics of a finished run, in Markdown."""
    if not result:
        return ""
    low, high = result["test_interval_95"]
    confusion, data = result["test"]["confusion"], result["data"]
    tested, chosen = data["pictures"]["test"], result["chosen"]
    guess = max(map(sum, confusion)) / max(tested, 1)
    notes = [f"- {escape_markup(str(note))}" for note in data["notes"][:5]]
    lines = [
        verdict_html(result),
        f"### Accuracy {result['test_accuracy']:.1%}",
        f"Measured on {tested:,} test images that were not used for training. The 95 % interval is **{low:.1%} to {high:.1%}** "
        f"(fewer test images make it wider). Always predicting the most frequent class gives {guess:.1%}.",
        f"Trained on {data['pictures']['train']:,} images of {len(data['classes']):,} classes. Epoch {chosen['epoch']} was "
        f"selected as the best on {data['pictures']['validation']:,} validation images ({result['val_accuracy']:.1%}). "
        f"{result['trainable_parameters']:,} trainable parameters; the file has {result['stored_bytes']:,} bytes.",
    ]
    return "\n\n".join([*filter(None, lines), *(["About the images:\n\n" + "\n".join(notes)] if notes else [])])


def run_table(job: Job | None) -> str:
    """Table of all runs of this page, newest first; empty for fewer than two."""
    if job is None:
        return ""
    every = [other for other in find_jobs(job.folder.parent) if other.kind == "classify"]
    if len(every) < 2:
        return ""
    rows = []
    for other in every:
        result = read_result(other)
        accuracy = f"{result['test_accuracy']:.1%}" if result else STATES[other.state]
        rows.append((f"{printable(other.title)}{' (above)' if other.name == job.name else ''}", other.created, accuracy))
    return table("All your runs, newest first: choose one in the list “Run” above", ("run", "started", "accuracy"), rows)


def comparison(job: Job | None) -> str:
    """Table of finished jobs on the same images, by validation accuracy; empty for fewer than two."""
    if job is None:
        return ""
    same = [other for other in find_jobs(job.folder.parent) if _data(other) == _data(job) and other.state == "done"]
    results = sorted(((r, other) for other in same if (r := read_result(other))), key=lambda each: -each[0]["val_accuracy"])
    if len(results) < 2:
        return ""
    rows = table("All methods on these images", COLUMNS, [_row(r) for r, _ in results])
    apart = (
        "<p>Where the intervals of two methods overlap, the difference may be due to chance: try other seeds or more images.</p>"
    )
    return rows + apart


def _row(result: dict[str, Any]) -> list[object]:
    low, high = result["test_interval_95"]
    return [
        result["config"]["method"], f"{result['test_accuracy']:.1%}", f"{low:.1%} to {high:.1%}", result["chosen"]["epoch"],
        result["trainable_parameters"], result["stored_bytes"], result["model"]["name"],
    ]  # fmt: skip


def read_result(job: Job) -> dict[str, Any]:
    """Content of `result.json`; empty if missing or incomplete."""
    try:
        content = json.loads((job.run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "test_interval_95" in content else {}


def _data(job: Job) -> Any:
    """Data source of a job; its name if it is of another kind."""
    words = job.command
    return words[1] if job.kind == "classify" and len(words) > 1 else job.name


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
