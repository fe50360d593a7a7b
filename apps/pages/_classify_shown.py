"""How a classifier's job goes, and what came of it, as the page Classify shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.classifying.selection import Epoch, read_epochs

from ..jobs import Job, find
from ..studio import escaped
from ._html import table
from ._job import offered, picture, sheet_picture

SHEETS = {"confusion": "What was taken for what", "curves": "How it learnt", "mistakes": "The worst mistakes"}
ASKED = ("adapter.safetensors", "model.json")
"""What `veneer predict` needs; offered for download."""
HEAD = ("method", "right", "expect", "best epoch", "trained numbers", "bytes", "model")


def parts() -> list[Any]:
    """The components below a job, in the order of `values`."""
    words = gr.Markdown("", elem_id="classify-words")
    accuracy = gr.LinePlot(
        None, "epoch", "right, %", label="Validation pictures that are answered rightly", visible=False, height=240,
        min_width=280, y_lim=[0, 100], buttons=[], elem_id="classify-accuracy",
    )  # fmt: skip
    with gr.Row():
        sheets = [sheet_picture(label, elem_id=f"classify-{name}") for name, label in SHEETS.items()]
    compared = gr.HTML("", label="Methods on these pictures", elem_id="classify-compared")
    files = gr.File(label="To keep: what was learnt, and how to open it", file_count="multiple", interactive=False, visible=False)
    return [words, accuracy, *sheets, compared, files]


def values(job: Job | None) -> list[Any]:
    """What `parts` show of a job."""
    epochs = read_epochs(job.run) if job else []
    kept = [job.run / name for name in ASKED] if job else []
    done = job is not None and job.state == "done"
    sheets = [gr.Image(value=picture(job.run / f"{name}.png") if job else None, visible=done) for name in SHEETS]
    return [
        told(job, epochs),
        gr.LinePlot(accuracies(epochs), visible=len(epochs) > 1),
        *sheets,
        comparison(job),
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
    return pd.DataFrame({"epoch": [e.epoch for e in epochs], "right, %": [round(100 * e.val_accuracy, 2) for e in epochs]})


def told(job: Job | None, epochs: Sequence[Epoch]) -> str:
    """A job's accuracy so far, or in the end, in plain words, as Markdown."""
    if job is None:
        return ""
    if job.state == "done":
        return outcome(result(job))
    if not epochs:
        return ""
    last, best = epochs[-1], min(epochs, key=lambda e: (-e.val_accuracy, e.val_loss, e.step))
    so_far = f"Epoch {last.epoch}: **{last.val_accuracy:.1%}** of the validation pictures are answered rightly."
    better = "" if best is last else f" The best so far is epoch {best.epoch}, {best.val_accuracy:.1%}; the best one is kept."
    return f"{so_far}{better} The test pictures are looked at once, at the end."


def outcome(found: dict[str, Any]) -> str:
    """The figures of a finished run in plain words, as Markdown."""
    if not found:
        return ""
    low, high = found["test_interval_95"]
    confusion, data = found["test"]["confusion"], found["data"]
    tested, chosen = data["pictures"]["test"], found["chosen"]
    guess = max(map(sum, confusion)) / max(tested, 1)
    notes = [f"- {escaped(str(note))}" for note in data["notes"][:5]]
    lines = [
        f"### {found['test_accuracy']:.1%} right",
        f"Of {tested:,} test pictures that it had never seen, {found['test_accuracy']:.1%} were answered rightly. On more "
        f"pictures of this kind expect **{low:.1%} to {high:.1%}** (a 95 % interval: fewer test pictures make it wider). Who "
        f"always says the most frequent class is right {guess:.1%} of the time.",
        f"It learnt from {data['pictures']['train']:,} pictures of {len(data['classes']):,} classes. Epoch {chosen['epoch']} was "
        f"kept, the best on {data['pictures']['validation']:,} validation pictures ({found['val_accuracy']:.1%}). "
        f"{found['trainable_parameters']:,} numbers were trained; its file has {found['stored_bytes']:,} bytes.",
    ]
    return "\n\n".join([*lines, *(["Noticed in the pictures:\n\n" + "\n".join(notes)] if notes else [])])


def comparison(job: Job | None) -> str:
    """A table of the finished jobs on the same pictures, the best on validation pictures first; nothing for fewer than two."""
    if job is None:
        return ""
    same = [other for other in find(job.folder.parent) if _data(other) == _data(job) and other.state == "done"]
    found = sorted(((r, other) for other in same if (r := result(other))), key=lambda each: -each[0]["val_accuracy"])
    if len(found) < 2:
        return ""
    told = table("Methods on these pictures", HEAD, [_row(r) for r, _ in found])
    apart = (
        "<p>Where the ranges of two methods overlap much, the difference may be chance: try other seeds, or more pictures.</p>"
    )
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
