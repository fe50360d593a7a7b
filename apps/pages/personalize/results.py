"""What the page Teach shows of a run: its verdict, the way to Generate, the image grid, metrics and files."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...jobs import Job
from ..shared.job_view import offered, picture, sheet_picture
from ..shared.training_result import files, in_words
from ..shared.verdict import read_result, verdict

KOHYA = 3
"""Place of the button for other tools in what `parts` gives."""


def shown_results(job: Job | None) -> list[Any]:
    """The image grid, the metrics, the files, the button for other tools, the verdict and the way to Generate, of a job."""
    there = files(job) if job else []
    result = read_result(job) if job else {}
    sheet = picture(job.run / "before_after.png") if job else None
    said = in_words(job) if job else ""
    return [
        gr.Image(value=sheet, visible=sheet is not None),
        gr.Markdown(said, visible=bool(said)),
        gr.File(offered(there, job.title if job else "") or None, visible=bool(there)),
        gr.Button(visible=bool(there)),
        gr.File(None, visible=False),
        gr.HTML(verdict(result), visible=bool(verdict(result))),
        gr.Button(visible=bool(there)),
    ]


def stamp(job: Job) -> Any:
    """What the shown results depend on."""
    return job.state, [path.stat().st_mtime_ns for path in files(job)]


def parts() -> list[Any]:
    """Components in the order of `shown_results`; the verdict stands first."""
    first = [
        gr.HTML(visible=False, elem_id="teach-verdict"),
        gr.Button("Generate with it", variant="primary", visible=False, elem_id="teach-generate"),
    ]
    return [*_files(), *first]


def _files() -> list[Any]:
    return [
        sheet_picture("Before and after", elem_id="teach-sheet"),
        gr.Markdown(visible=False, elem_id="teach-figures"),
        gr.File(label="Files", file_count="multiple", interactive=False, visible=False, elem_id="teach-files"),
        gr.Button("Make a file for ComfyUI and A1111", visible=False, elem_id="teach-kohya"),
        gr.File(
            label="For ComfyUI and A1111: LoRA to models/loras, embedding to embeddings; its trigger is the file name",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id="teach-kohya-file",
        ),
    ]
