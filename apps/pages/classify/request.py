"""What the page Classify asks for, looked at, as words of `veneer transfer`."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.classification.config import TransferConfig
from veneer.classification.data.sources import open_source
from veneer.classification.models.compatibility import compatible_methods
from veneer.classification.models.loading import check_name
from veneer.injection import OptionError, VeneerError
from veneer.training.data.image_io import DataError
from veneer.training.param_groups import split_methods

from ...context import Studio
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, bounded, safe, shown
from ...zip_archives import take_zip

KIND = "classify"
DIGITS, ZIP, FOLDER, AGAIN = "digits", "zip", "folder", "again"
SOURCES = {
    DIGITS: "Handwritten digits (built in)",
    ZIP: "My images, in a zip",
    FOLDER: "A folder on this machine",
    AGAIN: "The images of the run below",
}
AUGMENT = {
    "flip": "crops and flips",
    "light": "crops",
    "strong": "crops, flips and color changes",
    "none": "none",
}
USUAL = TransferConfig()


@dataclass(frozen=True)
class Wanted:
    """The page's values, as they come; the number 0 means the default."""

    source: str = DIGITS
    file: str | None = None
    folder: str = ""
    job: str | None = None
    model: str = USUAL.model
    methods: Sequence[str] = ("linear_probe",)
    epochs: float | None = USUAL.epochs
    shots: float | None = 0
    size: float | None = 0
    batch: float | None = USUAL.batch
    rate: float | None = 0
    augment: str = USUAL.augment
    patience: float | None = 0
    seed: float | None = 0


def begin(studio: Studio, workspace: Workspace, wanted: Wanted) -> tuple[list[Job], list[str]]:
    """A job for each method, on the same pictures and splits; gives them, and what was left out of a zip.

    Raises:
        VeneerError: something that was asked for cannot work, or too many jobs wait. Nothing has been begun then.
    """
    options = settings(workspace, wanted)
    methods = chosen(wanted.methods, wanted.model)
    free = LIMITS.jobs - workspace.waiting()
    if len(methods) > free:
        raise VeneerError(
            f"{len(methods)} methods need {len(methods)} jobs, but the queue has room for {max(free, 0)}. Choose fewer, or wait "
            "for a job to end.",
            where="jobs",
            given=len(methods),
            expected=max(free, 0),
        )
    data, name, left_out = pictures(workspace, wanted)
    found = []
    for method in methods:
        found.append(studio.begin(workspace, KIND, f"{name} · {method}", ["transfer", data, f"--method={method}", *options]))
    return found, left_out


def settings(workspace: Workspace, wanted: Wanted) -> list[str]:
    """Model and settings as words.

    Raises:
        VeneerError: no such model, or a number outside of its range.
    """
    words = [f"--model={model(workspace, wanted.model)}"]
    whole = (
        ("epochs", wanted.epochs, 1, LIMITS.epochs),
        ("batch", wanted.batch, 1, LIMITS.batch),
        ("size", wanted.size, 8, LIMITS.side),
        ("shots", wanted.shots, 1, LIMITS.zip_files),
        ("patience", wanted.patience, 1, LIMITS.epochs),
        ("seed", wanted.seed, 0, 2**31 - 1),
    )
    for name, value, least, most in whole:
        if value is None:
            message = f"{name} is empty; expected {least:g} to {most:g}, or 0 for the default."
            raise OptionError(message, option=name, given=None, expected=(least, most))
        if value:
            words.append(f"--{name}={int(within(name, value, least, most))}")
    if wanted.rate is None:
        raise OptionError("learning rate is empty; expected a number, or 0 for the default.", option="learning rate", given=None)
    if wanted.rate:
        words.append(f"--learning-rate={within('learning rate', wanted.rate, 1e-7, 10.0):g}")
    if wanted.augment not in AUGMENT:
        message = f"augmentation is {shown(str(wanted.augment))!r}; expected one of {', '.join(AUGMENT)}."
        raise OptionError(message, option="augmentation", given=wanted.augment, expected=tuple(AUGMENT))
    return [*words, f"--augment={wanted.augment}"]


def within(name: str, value: Any, least: float, most: float) -> float:
    """A number of the page.

    Raises:
        VeneerError: it is none, or out of its range.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
        message = f"{name} is {shown(str(value))}; expected {least:g} to {most:g}."
        raise OptionError(message, option=name, given=value, expected=(least, most))
    return value


def model(workspace: Workspace, name: str) -> str:
    """The name of a model, or a folder of one where nobody logs in.

    Raises:
        VeneerError: there is none of that name.
    """
    name = bounded(name or "", "model")
    folder = Path(name).expanduser()
    if workspace.user is None and folder.is_dir() and ("/" in name or "\\" in name):
        return str(folder.resolve())
    check_name(name)
    return name


def chosen(methods: Sequence[str], model: str) -> list[str]:
    """The methods, each once; several at once are joined by `+`.

    Raises:
        VeneerError: none, or one that this model cannot be taught by.
    """
    known = compatible_methods(model)
    found = list(dict.fromkeys(re.sub(r"\s", "", str(method)) for method in methods or ()))
    if not found:
        message = "no method is chosen; choose one or more, such as linear_probe and lora."
        raise OptionError(message, option="methods", given=())
    for method in found:
        for name in [method] if method == "zero_shot" else split_methods(method):
            if name not in known:
                message = f"{shown(name)!r} is no method that this model can be taught by. Choose one of the list."
                raise OptionError(message, option="methods", given=name, expected=tuple(known))
    return found


def pictures(workspace: Workspace, wanted: Wanted) -> tuple[str, str, list[str]]:
    """The word for `veneer transfer`, a name for people, and what was left out.

    Raises:
        VeneerError: no pictures of at least two classes there, or a place that this visitor may not look into.
    """
    if wanted.source == DIGITS:
        return DIGITS, DIGITS, []
    if wanted.source == AGAIN:
        return of_job(workspace, str(wanted.job or ""))
    if wanted.source == ZIP:
        return unpacked(workspace, wanted.file)
    if wanted.source != FOLDER or workspace.user is not None:
        message = "a folder of this machine can be read only where nobody logs in. Bring your pictures in a zip."
        raise OptionError(message, option="source", given=wanted.source)
    place = bounded(wanted.folder or "", "folder")
    if not place:
        message = "no folder is given; write its path, such as /home/me/pets, with a folder for each class in it."
        raise OptionError(message, option="folder", given="")
    path = Path(place).expanduser().resolve()
    checked(str(path), place)
    return str(path), safe(path.name, "folder"), []


def of_job(workspace: Workspace, name: str) -> tuple[str, str, list[str]]:
    """The pictures of an earlier job."""
    about = workspace.job(name).about
    words, title = about.get("words", []), str(about.get("title"))
    if about.get("kind") != KIND or len(words) < 2:
        message = "the run below has no labeled images. Choose other images."
        raise OptionError(message, option="job", given=name)
    checked(words[1], title)
    return words[1], title.rpartition(" · ")[0] or title, []


def unpacked(workspace: Workspace, file: str | None) -> tuple[str, str, list[str]]:
    """Pictures of a zip, unpacked where the same zip always goes, so that later jobs on it can be compared."""
    if not file:
        message = "no zip is chosen. Put pictures into a folder for each class, zip these folders, and drop the zip here."
        raise OptionError(message, option="file", given=None)
    path, left_out = Path(file), list[str]()
    name = safe(path.stem, "pictures")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    place = workspace.given / f"{name}-{digest}"
    if not place.is_dir():
        fresh = workspace.new_given()
        try:
            _, left_out = take_zip(path, fresh)
            inner = inside(fresh)
            checked(str(inner), "the zip")
            inner.rename(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return str(place), name, left_out


def inside(folder: Path) -> Path:
    """The folder that holds the classes: where it holds nothing but one folder of folders, that one."""
    held = list(folder.iterdir())
    if len(held) == 1 and held[0].is_dir() and all(each.is_dir() for each in held[0].iterdir()):
        return held[0] if held[0].name.lower() not in ("train", "training") else folder
    return folder


def checked(data: str, name: str) -> None:
    """Look for classes of pictures, by names only.

    Raises:
        VeneerError: none, or one only.
    """
    try:
        found = open_source(data)
    except DataError as error:
        raise VeneerError.from_error(error, str(error).replace(data, shown(name)), file=name) from error
    if len(found.classes) < 2:
        raise VeneerError(
            f"{shown(name)}: one class, {shown(found.classes[0])}; expected at least two: a folder for each, with its pictures.",
            file=shown(name),
            where="classes",
            given=found.classes,
            expected=2,
        )
