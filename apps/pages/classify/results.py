"""Progress and results of classifier runs on the page Classify."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.classification.objectives.multi_label import objective_of
from veneer.classification.objectives.objective import Objective
from veneer.classification.train.epoch_selection import Epoch, read_epochs

from ...context import escape_markup
from ...jobs import Job, find_jobs
from ...workspace import printable
from ..shared.html import table
from ..shared.job_text import STATES
from ..shared.job_view import copy_for_download, grid_image, open_image
from ..shared.verdict import verdict_html
from .labeled_data import MULTI_LABEL

HEIGHT = 420
"""Height in pixels of the figures shown side by side."""
CLASSIFIER_FILES = ("adapter.safetensors", "model.json")
"""Files that `veneer predict` needs; available for download."""
SCORE = "score, %"
"""Column of the plot of epochs: the accuracy, or the mean average precision of several labels."""
FEW_EPOCHS = 16
"""Up to this many epochs the axis is categorical, since a numeric axis would show half epochs."""


def result_components(extra: Callable[[], list[Any]] = list) -> list[Any]:
    """Result components of a job, in the order of `result_values`; those of `extra` follow the first."""
    words = gr.Markdown("", elem_id="classify-words")
    extra_components = extra()
    labels = gr.HTML("", label="Each label", elem_id="classify-labels")
    accuracy = gr.LinePlot(
        None, "epoch", SCORE, label="Validation score", visible=False, height=240,
        min_width=280, y_lim=[0, 100], buttons=[], elem_id="classify-accuracy",
    )  # fmt: skip
    compared = gr.HTML("", label="All methods on these images", elem_id="classify-compared")
    with gr.Row():
        figures = [grid_image("Classes", elem_id="classify-confusion", height=HEIGHT)]
        figures.append(grid_image("Loss", elem_id="classify-curves", height=HEIGHT))
    figures.append(grid_image("Most confident mistakes", elem_id="classify-mistakes"))
    earlier = gr.HTML("", label="All your runs", elem_id="classify-runs")
    files = gr.File(
        label="Files: the classifier and how to load it", file_count="multiple", interactive=False, visible=False,
        elem_classes="downloads", elem_id="classify-files",
    )  # fmt: skip
    return [words, *extra_components, labels, accuracy, compared, *figures, earlier, files]


def result_values(job: Job | None) -> list[Any]:
    """Values of `result_components` for a job."""
    epochs = read_epochs(job.run) if job else []
    files_ = [job.run / name for name in CLASSIFIER_FILES] if job else []
    done = job is not None and job.state == "done"
    curves = job is not None and done and (job.run / "curves.png").exists()  # they show the score as well
    objective = objective_of(job is not None and MULTI_LABEL in job.command)
    plots = {
        objective.plot: "Average precision of each label" if objective.multiple else "Confusion matrix",
        "curves.png": f"Loss and {objective.metric}",
        "mistakes.png": "Most confident mistakes",
    }
    images = {name: open_image(job.run / name) if job and done else None for name in plots}
    return [
        describe(job, epochs),
        label_scores(read_result(job)) if job and done else "",
        gr.LinePlot(
            accuracy_curve(epochs),
            label=f"Validation {objective.metric}",
            visible=len(epochs) > 1 and not curves,
            sort=[str(e.epoch) for e in epochs] or None,
        ),
        comparison(job),
        *(gr.Image(value=image, label=plots[name], visible=image is not None) for name, image in images.items()),
        run_table(job),
        gr.File(value=copy_for_download(files_), visible=any(path.exists() for path in files_)),
    ]


def stamp(job: Job) -> Any:
    """Cache key of `result_values` from file times."""
    times = [_mtime(job.run / name) for name in ("curve.json", "result.json", *CLASSIFIER_FILES)]
    return (job.state, *times, sum(1 for _ in job.folder.parent.glob("*/run/result.json")))


def accuracy_curve(epochs: Sequence[Epoch]) -> Any:
    """Table of the validation score by epoch; None with fewer than two epochs."""
    import pandas as pd

    if len(epochs) < 2:
        return None
    marks = [e.epoch for e in epochs] if len(epochs) > FEW_EPOCHS else [str(e.epoch) for e in epochs]
    return pd.DataFrame({"epoch": marks, SCORE: [round(100 * e.val_accuracy, 2) for e in epochs]})


def describe(job: Job | None, epochs: Sequence[Epoch]) -> str:
    """Score of a job so far, or its final summary, in Markdown."""
    if job is None:
        return ""
    if job.state == "done":
        return summarize(read_result(job))
    if not epochs:
        return ""
    last, best = epochs[-1], min(epochs, key=lambda e: (-e.val_accuracy, e.val_loss, e.step))
    metric = objective_of(MULTI_LABEL in job.command).metric
    so_far = f"Epoch {last.epoch}: validation {metric} **{last.val_accuracy:.1%}**."
    better = "" if best is last else f" The best so far is epoch {best.epoch}, {best.val_accuracy:.1%}; its weights are saved."
    return f"{so_far}{better} The test images are evaluated once, at the end."


def summarize(result: dict[str, Any]) -> str:
    """Verdict and metrics of a finished run, in Markdown."""
    if not result:
        return ""
    data, chosen, objective = result["data"], result["chosen"], _objective(result)
    low, high = result["test_interval_95"]
    notes = [f"- {escape_markup(str(note))}" for note in data["notes"][:5]]
    summaries = [escape_markup(f"{m['name']}: {m['summary']}") for m in result.get("methods", []) if m.get("summary")]
    lines = [
        verdict_html(result),
        f"### {objective.metric[0].upper()}{objective.metric[1:]} {result[f'test_{objective.key}']:.1%}",
        f"Measured on {data['pictures']['test']:,} test images that were not used for training. The 95 % interval is "
        f"**{low:.1%} to {high:.1%}** (fewer test images make it wider). {_without_images(result)}",
        f"Trained on {data['pictures']['train']:,} images of {len(data['classes']):,} "
        f"{'labels' if objective.multiple else 'classes'}. Epoch {chosen['epoch']} was selected as the best on "
        f"{data['pictures']['validation']:,} validation images ({result[f'val_{objective.key}']:.1%}). "
        f"{result['trainable_parameters']:,} trainable parameters; the file has {result['stored_bytes']:,} bytes.",
        *(f"**{text}**" for text in summaries),
    ]
    return "\n\n".join([*filter(None, lines), *(["About the images:\n\n" + "\n".join(notes)] if notes else [])])


def _without_images(result: dict[str, Any]) -> str:
    """Score of predictions that do not look at the images, and of several labels F1."""
    test = result["test"]
    if not _objective(result).multiple:
        guess = max(map(sum, test["confusion"])) / max(result["data"]["pictures"]["test"], 1)
        return f"Always predicting the most frequent class gives {guess:.1%}."
    chances = [count / max(test["pictures"], 1) for count in test["images_of_class"].values() if count]
    f1 = f"micro F1 {test['micro_f1']:.1%}, macro F1 {test['macro_f1']:.1%}"
    random = sum(chances) / max(len(chances), 1)
    return f"A random ranking gives {random:.1%}. Labels with a probability of at least 50 % have {f1}."


def label_scores(result: dict[str, Any]) -> str:
    """Table of the labels of a run with several per image, lowest average precision first; empty for other runs."""
    if not result or not _objective(result).multiple:
        return ""
    test = result["test"]
    counts = test["images_of_class"]
    scores = sorted(test["average_precision"].items(), key=lambda each: (each[1] is None, each[1] or 0.0, each[0]))
    rows = [
        (name, "–" if score is None else f"{score:.1%}", f"{counts[name] / max(test['pictures'], 1):.1%}", counts[name])
        for name, score in scores
    ]
    return table(
        "Each label, lowest average precision first", ("label", "average precision", "random ranking", "test images"), rows
    )


def score_text(result: dict[str, Any]) -> str:
    """Test score of a run with the name of its metric."""
    objective = _objective(result)
    return f"{result[f'test_{objective.key}']:.1%} {objective.short}"


def _objective(result: dict[str, Any]) -> Objective:
    return objective_of(bool(result["config"].get("multi_label")))


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
        score = score_text(result) if result else STATES[other.state]
        rows.append((f"{printable(other.title)}{' (above)' if other.name == job.name else ''}", other.created, score))
    return table("All your runs, newest first: choose one in the list “Run” above", ("run", "started", "test score"), rows)


def comparison(job: Job | None) -> str:
    """Table of finished jobs on the same images, by validation score; empty for fewer than two."""
    if job is None:
        return ""
    same = [other for other in find_jobs(job.folder.parent) if _data(other) == _data(job) and other.state == "done"]
    results = sorted(filter(None, map(read_result, same)), key=lambda result: -result[f"val_{_objective(result).key}"])
    if len(results) < 2:
        return ""
    columns = ("method", _objective(results[0]).metric, "95 % interval", "best epoch", "trainable parameters", "bytes", "model")
    rows = table("All methods on these images", columns, [_row(result) for result in results])
    apart = (
        "<p>Where the intervals of two methods overlap, the difference may be due to chance: try other seeds or more images.</p>"
    )
    return rows + apart


def _row(result: dict[str, Any]) -> list[object]:
    low, high = result["test_interval_95"]
    score = result[f"test_{_objective(result).key}"]
    return [
        result["config"]["method"], f"{score:.1%}", f"{low:.1%} to {high:.1%}", result["chosen"]["epoch"],
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
    """Data source of a job, and whether its images have several labels; the name of a job of another kind."""
    words = job.command
    return (words[1], MULTI_LABEL in words) if job.kind == "classify" and len(words) > 1 else job.name


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
