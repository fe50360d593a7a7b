"""A job that teaches a base to follow maps or pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer import base_models
from veneer.control.config import ControlConfig
from veneer.control.maps.maps import computed
from veneer.injection import OptionError, methods

from ...context import Studio
from ...jobs import Job
from ...uploads import take_photos
from ...workspace import Workspace, bounded
from ..shared.generation_request import number
from ..shared.time_estimates import duration


@dataclass(frozen=True)
class Length:
    """Steps, and images that the base generates to train on."""

    steps: int
    images: int


LENGTHS = {"quick": Length(200, 64), "balanced": Length(400, 192), "thorough": Length(800, 384)}
"""Presets. Agreement of edges (F1) with ControlNet, against 0.16 to 0.24 without: quick 0.35, thorough 0.63; 100 steps gave 0.20,
and worse images than the base alone."""
IDLE = {"controlnet": 0.3, "t2i_adapter": 0.2, "controlnext": 0.7, "ip_adapter": 0.25}
"""Seconds of a step on the bundled base, on two idle CPU cores."""
IMAGE = 0.2
"""Seconds of an image there."""
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
    base: Any = "bundled"
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


def lengths(method: str, base: str, workspace: Workspace | None = None) -> list[tuple[str, str]]:
    """Choices of the presets: what each means, with its minutes, and its name."""
    factor = usual_steps(method, base) / LENGTHS["thorough"].steps
    found = []
    for name, length in LENGTHS.items():
        steps = max(1, round(length.steps * factor))
        seconds = expected(method, base, steps, length.images, workspace)
        minutes = f", {duration(seconds)}" if seconds else ""
        found.append((f"{name}: {steps:,} steps, {length.images} images{minutes}", name))
    return found


def chosen(preset: str, method: str, base: str) -> tuple[int, int]:
    """Steps and images of a preset."""
    length = LENGTHS.get(preset, LENGTHS["balanced"])
    return max(1, round(length.steps * usual_steps(method, base) / LENGTHS["thorough"].steps)), length.images


def expected(method: str, base: str, steps: int, images: int, workspace: Workspace | None = None) -> float | None:
    """Seconds of a job from start to files, images and evaluation included; None if nothing like it has run.

    The time of the newest finished job with this base counts, in proportion; before there is one, that of two idle cores.
    """
    for job in workspace.all_jobs() if workspace else ():
        words = dict(w[2:].split("=", 1) for w in job.about.get("words", []) if w.startswith("--") and "=" in w)
        if job.about.get("kind") != "control" or words.get("base") != base or job.state != "done" or not job.seconds:
            continue
        its_steps = int(words.get("steps") or usual_steps(words["method"], base))
        its_images = int(words.get("generated-images") or 384)
        return job.seconds * _idle(method, steps, images) / _idle(words["method"], its_steps, its_images)
    return _idle(method, steps, images) if base == "bundled" else None


def _idle(method: str, steps: int, images: int) -> float:
    """Loading, images, steps, four previews of six maps in three ways, and two of each held map in three ways."""
    generated = images + 4 * 6 * 3 + 2 * 3 * max(1, round(0.1 * images))
    return 10 + IMAGE * generated + IDLE.get(method, max(IDLE.values())) * steps


def begin(studio: Studio, workspace: Workspace, lesson: Lesson) -> tuple[Job, list[str]]:
    """Start the job; gives it, and what was left out of the photos.

    Raises:
        VeneerError: what cannot be taught.
    """
    if lesson.method not in ways():
        known = tuple(ways())
        raise OptionError(f"method: choose one of {', '.join(known)}.", option="method", given=lesson.method, expected=known)
    if lesson.condition not in (fitting := tuple(conditions(lesson.method))):
        message = f"{lesson.method} can follow {', '.join(fitting)}. Choose one of them."
        raise OptionError(message, option="condition", given=lesson.condition, expected=fitting)
    base = bounded(str(lesson.base or "bundled"), "base")
    usual = base_models.preset(base)
    if not lesson.photos and not (usual.things and usual.scenes):
        message = f"{base} does not say what it can draw by itself. Bring photos to learn from."
        raise OptionError(message, option="photos", where=base, given=0)
    caption, title = bounded(str(lesson.caption or ""), "caption"), bounded(str(lesson.title or ""), "title")
    words = ["control", "train", f"--method={lesson.method}", f"--condition={lesson.condition}", f"--base={base}"]
    words += [
        f"--generated-images={int(number(lesson.drawn, 'pictures drawn', 8, MOST_DRAWN))}",
        "--tracker=none",
        "--checkpoint-every=100",
    ]
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
                message = "one picture is too few: one is learnt from, and one measures. Bring two or more."
                raise OptionError(message, option="photos", given=len(taken), expected=2)
            words.insert(2, str(folder))
        return studio.begin(workspace, "control", title or f"{lesson.condition} by {lesson.method}", words), refused
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
