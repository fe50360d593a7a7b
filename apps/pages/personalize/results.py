"""Results on the page Train: verdict, link to Generate, image grid, metrics and files."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...jobs import Job
from ..shared.job_view import copy_for_download, grid_image, open_image
from ..shared.training_result import result_files, summarize
from ..shared.verdict import read_result, verdict_html
from .concept_groups import concept_scores
from .config_files import config_download

KOHYA = 3
"""Index of the export button in `result_components`."""


def result_values(job: Job | None) -> list[Any]:
    """Values of `result_components`: image grid, metrics, files, export button and file, verdict, and link to Generate."""
    existing = result_files(job) if job else []
    result = read_result(job) if job else {}
    grid = open_image(job.run / "before_after.png") if job else None
    summary = summarize(job) if job else ""
    files = [*copy_for_download(existing, job.title), *config_download(job)] if job and existing else []
    return [
        gr.Image(value=grid, visible=grid is not None),
        gr.Markdown(summary, visible=bool(summary)),
        gr.File(files or None, visible=bool(existing)),
        gr.Button(visible=bool(existing)),
        gr.File(None, visible=False),
        gr.HTML(verdict_html(result) + concept_scores(result), visible=bool(result and verdict_html(result))),
        gr.Button(visible=bool(existing)),
    ]


def stamp(job: Job) -> Any:
    """Cache key of the results: state of the job and modification times of its files."""
    return job.state, [path.stat().st_mtime_ns for path in result_files(job)]


def result_components() -> list[Any]:
    """Components in the order of `result_values`; verdict and link are placed first."""
    first = [
        gr.HTML(visible=False, elem_id="train-verdict"),
        gr.Button("Generate with it", variant="primary", visible=False, elem_id="train-generate"),
    ]
    return [*_files(), *first]


def _files() -> list[Any]:
    return [
        grid_image("Before and after", elem_id="train-sheet"),
        gr.Markdown(visible=False, elem_id="train-metrics"),
        gr.File(label="Files", file_count="multiple", interactive=False, visible=False, elem_id="train-files"),
        gr.Button("Export for ComfyUI and A1111", visible=False, elem_id="train-kohya"),
        gr.File(
            label="For ComfyUI and A1111: copy the LoRA to models/loras, the embedding to embeddings (trigger: its file name)",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id="train-kohya-file",
        ),
    ]
