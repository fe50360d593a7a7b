"""Entries of the gallery: thumbnails and settings of images, and results of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...image_store import settings_of
from ...jobs import Job
from ...workspace import Workspace, printable
from ..shared.html import facts
from ..shared.job_view import open_image
from ..shared.verdict import OUTCOMES, read_result

SIDE = 320
"""Longest side of a thumbnail in pixels."""
RUNS = 24
"""Runs shown."""
IMAGES = {
    "train": ("samples/00.png", "before_after.png"),
    "control": ("samples/00.png", "sheet.png"),
    "classify": ("confusion.png", "average_precision.png"),
}
"""Kind of a job to the image that stands for its result: the first that exists."""


def thumbnails(files: Sequence[Path]) -> list[tuple[Image.Image, str]]:
    """Thumbnails with captions; files that cannot be read are gray, so that positions stay."""
    return [(_small(open_image(file)), _caption(settings_of(file))) for file in files]


def describe_image(file: Path) -> str:
    """Settings of an image in HTML."""
    settings = settings_of(file)
    adapters = [each for each in settings.get("adapters") or () if isinstance(each, dict)]
    names = ", ".join(f"{each.get('file')} × {each.get('scale')}" for each in adapters)
    size = settings.get("size")
    pairs = [
        ("Prompt", settings.get("prompt")),
        ("Negative prompt", settings.get("negative")),
        ("Seed", settings.get("seed")),
        ("Adapters", names or "none: the base model alone"),
        ("Base model", settings.get("base")),
        ("Steps", settings.get("steps")),
        ("Guidance scale", settings.get("guidance")),
        ("Height × width", " × ".join(map(str, size)) if isinstance(size, list) else ""),
    ]
    return facts([(name, value) for name, value in pairs if value not in (None, "")])


def finished_runs(workspace: Workspace) -> list[Job]:
    """Runs with a result, newest first."""
    return [job for job in workspace.all_jobs() if job.kind in IMAGES and job.state == "done"][:RUNS]


def run_thumbnails(jobs: Sequence[Job]) -> list[tuple[Image.Image, str]]:
    """An image of each run's result, with its title, time and verdict."""
    return [(_small(_result_image(job)), _run_caption(job)) for job in jobs]


def _result_image(job: Job) -> Image.Image | None:
    images = (open_image(job.run / name) for name in IMAGES[job.kind])
    return next((image for image in images if image is not None), None)


def _run_caption(job: Job) -> str:
    verdict: Any = read_result(job).get("verdict")
    outcome = OUTCOMES.get(str(verdict.get("outcome"))) if isinstance(verdict, dict) else None
    return " · ".join([printable(job.title), job.created, *([outcome[0]] if outcome else [])])


def _caption(settings: dict[str, Any]) -> str:
    return f"{printable(str(settings.get('prompt', '')), 48)} · seed {settings.get('seed')}"


def _small(image: Image.Image | None) -> Image.Image:
    if image is None:
        return Image.new("RGB", (SIDE, SIDE), "gray")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image
