"""A job that teaches a base to follow maps or pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer import bases
from veneer.control.config import ControlConfig
from veneer.control.maps import computed
from veneer.injection import VeneerError, methods

from ..jobs import Job
from ..studio import Studio
from ..uploads import take_photos
from ..workspace import Workspace, bounded
from ._wish import number

MOST_STEPS = 20_000
MOST_DRAWN = 2000


@dataclass(frozen=True)
class Lesson:
    """What is trained, as the page says; empty text means the default.

    Args:
        photos: files; none for pictures that the base draws, `drawn` of them. `caption`: of photos.
    """

    method: Any
    condition: Any
    base: Any = "shipped"
    steps: Any = 800
    photos: Sequence[str] = ()
    caption: Any = ""
    drawn: Any = 384
    title: Any = ""


def ways() -> list[str]:
    """Methods that follow something, those of other packages as well."""
    return [name for name in methods.names() if methods.get(name).conditions]


def reads_pictures(method: str) -> bool:
    """Whether a method follows a picture itself, and no map."""
    return "embeds" in methods.get(method).conditions


def conditions(method: str) -> list[str]:
    """What a method can learn to follow."""
    return ["image"] if reads_pictures(method) else computed()


def usual_steps(method: str, base: str) -> int:
    """Steps that are usual on a base."""
    return int(ControlConfig(method=method, base=base).completed().steps or 1)


def begin(studio: Studio, workspace: Workspace, lesson: Lesson) -> tuple[Job, list[str]]:
    """Start the job; gives it, and what was left out of the photos.

    Raises:
        VeneerError: what cannot be taught.
    """
    if lesson.method not in ways():
        raise VeneerError(f"method: choose one of {', '.join(ways())}.")
    if lesson.condition not in conditions(lesson.method):
        raise VeneerError(f"{lesson.method} can follow {', '.join(conditions(lesson.method))}. Choose one of them.")
    base = bounded(str(lesson.base or "shipped"), "base")
    usual = bases.preset(base)
    if not lesson.photos and not (usual.things and usual.scenes):
        raise VeneerError(f"{base} does not say what it can draw by itself. Bring photos to learn from.")
    caption, title = bounded(str(lesson.caption or ""), "caption"), bounded(str(lesson.title or ""), "title")
    words = ["control", "train", f"--method={lesson.method}", f"--condition={lesson.condition}", f"--base={base}"]
    words += [f"--drawn={int(number(lesson.drawn, 'pictures drawn', 8, MOST_DRAWN))}", "--tracker=none", "--checkpoint-every=100"]
    words += [f"--steps={int(number(lesson.steps, 'steps', 1, MOST_STEPS))}"]
    words += [f"--template={caption}"] if caption else []
    refused: list[str] = []
    folder = None
    if lesson.photos:
        folder = workspace.new_given()
    try:
        if folder is not None:
            taken, refused = take_photos(lesson.photos, folder)
            if len(taken) < 2:
                raise VeneerError("one picture is too few: one is learnt from, and one measures. Bring two or more.")
            words.insert(2, str(folder))
        return studio.begin(workspace, "control", title or f"{lesson.condition} by {lesson.method}", words), refused
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
