"""Results on the page Train as cards: verdict and link to Generate, before and after, files with their purposes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...jobs import Job
from ..shared.job_view import copy_for_download, grid_image, open_image
from ..shared.training_result import describe_files, result_files, summarize
from ..shared.verdict import read_result, verdict_html
from .comparison import comparison_html
from .concept_groups import concept_scores
from .config_files import config_download

KOHYA = 3
"""Index of the export button in `result_components`."""


def result_values(job: Job | None) -> list[Any]:
    """Values of `result_components`: image grid, metrics, files, export button and file, the cards, and link to Generate."""
    existing = result_files(job) if job else []
    result = read_result(job) if job else {}
    grid = open_image(job.run / "before_after.png") if job else None
    summary = summarize(job) if job else ""
    pairs = comparison_html(job) if job else ""
    scores = concept_scores(result)
    judgment = verdict_html(result) + (f'<section class="card">{scores}</section>' if scores else "")
    config = config_download(job) if job and existing else []
    files = [*copy_for_download(existing, job.title), *config] if job and existing else []
    return [
        gr.Image(value=grid, visible=grid is not None),
        gr.Markdown(summary, visible=bool(summary)),
        gr.File(files or None, visible=bool(existing)),
        gr.Button(visible=bool(existing)),
        gr.File(None, visible=False),
        gr.HTML(pairs, visible=bool(pairs)),
        gr.Accordion(visible=grid is not None, open=not pairs),
        gr.HTML(describe_files(job, config) if job else ""),
        gr.Column(visible=bool(existing)),
        gr.HTML(judgment, visible=bool(judgment)),
        gr.Button(visible=bool(existing)),
    ]


def stamp(job: Job) -> Any:
    """Cache key of the results: state of the job and modification times of its files."""
    return job.state, [path.stat().st_mtime_ns for path in result_files(job)]


def result_components() -> list[Any]:
    """Components in the order of `result_values`; on the page: verdict, link, images, files, metrics."""
    verdict = gr.HTML(visible=False, elem_id="train-verdict")
    link = gr.Button("Generate with it", variant="primary", visible=False, elem_id="train-generate")
    pairs = gr.HTML(visible=False, elem_id="train-pairs")
    with gr.Column(visible=False, elem_classes="card") as card:
        purposes = gr.HTML()
        files = gr.File(
            label="Files",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id="train-files",
            elem_classes="downloads",
        )
        export = gr.Button("Export for ComfyUI and A1111", visible=False, elem_id="train-kohya")
        export_file = gr.File(
            label="For ComfyUI and A1111: copy the LoRA to models/loras, the embedding to embeddings (trigger: its file name)",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id="train-kohya-file",
            elem_classes="downloads",
        )
    with gr.Accordion("All images and metrics in one image grid", open=False, visible=False, elem_id="train-all") as sheet:
        grid = grid_image("Before and after", elem_id="train-sheet")
    metrics = gr.Markdown(visible=False, elem_id="train-metrics")
    return [grid, metrics, files, export, export_file, pairs, sheet, purposes, card, verdict, link]
