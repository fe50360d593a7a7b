"""Training requests of the page Classify, validated and converted to `veneer transfer` commands."""

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
from veneer.classification.models.transformers_loading import PREFIX, is_transformers_name
from veneer.hub.names import is_repository
from veneer.injection import OptionError, VeneerError
from veneer.training.data.image_io import DataError
from veneer.training.method_names import split_methods

from ...context import Context
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, check_text, printable, safe_name
from ...zip_archives import unpack_zip

KIND = "classify"
DIGITS, ZIP, FOLDER, PREVIOUS = "digits", "zip", "folder", "again"
SOURCES = {
    DIGITS: "Handwritten digits (built in)",
    ZIP: "My images, in a zip",
    FOLDER: "A folder on this machine",
    PREVIOUS: "The images of the run below",
}
AUGMENT = {
    "flip": "crops and flips",
    "light": "crops",
    "strong": "crops, flips and color changes",
    "none": "none",
}
DEFAULTS = TransferConfig()


@dataclass(frozen=True)
class ClassifyRequest:
    """Unchecked values of the form; 0 means the default."""

    source: str = DIGITS
    file: str | None = None
    folder: str = ""
    job: str | None = None
    model: str = DEFAULTS.model
    methods: Sequence[str] = ("linear_probe",)
    epochs: float | None = DEFAULTS.epochs
    shots: float | None = 0
    size: float | None = 0
    batch: float | None = DEFAULTS.batch
    rate: float | None = 0
    augment: str = DEFAULTS.augment
    patience: float | None = 0
    seed: float | None = 0


def submit_jobs(context: Context, workspace: Workspace, request: ClassifyRequest) -> tuple[list[Job], list[str]]:
    """Submits one job per method on the same images and splits; returns them, and why images of a zip were rejected.

    Raises:
        VeneerError: an invalid request or too many queued jobs; no job is submitted in that case.
    """
    options = settings(workspace, request)
    methods = check_methods(request.methods, request.model)
    free = LIMITS.jobs - workspace.count_active()
    if len(methods) > free:
        raise VeneerError(
            f"{len(methods)} methods need {len(methods)} jobs, but the queue has room for {max(free, 0)}. Choose fewer, or wait "
            "for a job to end.",
            where="jobs",
            given=len(methods),
            expected=max(free, 0),
        )
    data, name, left_out = resolve_data(workspace, request)
    jobs = []
    for method in methods:
        jobs.append(context.submit(workspace, KIND, f"{name} · {method}", ["transfer", data, f"--method={method}", *options]))
    return jobs, left_out


def settings(workspace: Workspace, request: ClassifyRequest) -> list[str]:
    """Flags of the model and the settings.

    Raises:
        VeneerError: unknown model, or a number out of range.
    """
    flags = [f"--model={resolve_model(workspace, request.model)}"]
    whole = (
        ("epochs", request.epochs, 1, LIMITS.epochs),
        ("batch", request.batch, 1, LIMITS.batch),
        ("size", request.size, 8, LIMITS.side),
        ("shots", request.shots, 1, LIMITS.zip_files),
        ("patience", request.patience, 1, LIMITS.epochs),
        ("seed", request.seed, 0, 2**31 - 1),
    )
    for name, value, least, most in whole:
        if value is None:
            message = f"{name} is empty; expected {least:g} to {most:g}, or 0 for the default."
            raise OptionError(message, option=name, given=None, expected=(least, most))
        if value:
            flags.append(f"--{name}={int(check_number(name, value, least, most))}")
    if request.rate is None:
        raise OptionError("learning rate is empty; expected a number, or 0 for the default.", option="learning rate", given=None)
    if request.rate:
        flags.append(f"--learning-rate={check_number('learning rate', request.rate, 1e-7, 10.0):g}")
    if request.augment not in AUGMENT:
        message = f"augmentation is {printable(str(request.augment))!r}; expected one of {', '.join(AUGMENT)}."
        raise OptionError(message, option="augmentation", given=request.augment, expected=tuple(AUGMENT))
    return [*flags, f"--augment={request.augment}"]


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """Checks that a value is a number in a range.

    Raises:
        VeneerError: it is not.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
        message = f"{name} is {printable(str(value))}; expected {least:g} to {most:g}."
        raise OptionError(message, option=name, given=value, expected=(least, most))
    return value


def resolve_model(workspace: Workspace, name: str) -> str:
    """Checks the name of a model; a folder is accepted if the app has no logins.

    Raises:
        VeneerError: unknown model.
    """
    name = check_text(name or "", "model")
    prefix, path = (PREFIX, name.removeprefix(PREFIX)) if is_transformers_name(name) else ("", name)
    folder = Path(path).expanduser()
    if workspace.user is None and folder.is_dir() and ("/" in path or "\\" in path):
        return f"{prefix}{folder.resolve()}"
    if workspace.user is not None and prefix and not is_repository(path):
        raise OptionError(f"{name}: expected hf:USER/REPO of the hub.", option="model", given=name, expected="hf:USER/REPO")
    check_name(name)
    return name


def check_methods(methods: Sequence[str], model: str) -> list[str]:
    """Checks the methods and removes duplicates; combined methods are joined by `+`.

    Raises:
        VeneerError: no method, or one that the model does not support.
    """
    known = compatible_methods(model)
    chosen = list(dict.fromkeys(re.sub(r"\s", "", str(method)) for method in methods or ()))
    if not chosen:
        message = "no method is chosen; choose one or more, such as linear_probe and lora."
        raise OptionError(message, option="methods", given=())
    for method in chosen:
        for name in [method] if method == "zero_shot" else split_methods(method):
            if name not in known:
                message = f"{printable(name)!r} is not supported by this model. Choose a method from the list."
                raise OptionError(message, option="methods", given=name, expected=tuple(known))
    return chosen


def resolve_data(workspace: Workspace, request: ClassifyRequest) -> tuple[str, str, list[str]]:
    """Resolves the image source to the argument of `veneer transfer`, a display name, and why images were rejected.

    Raises:
        VeneerError: fewer than two classes of images, or a source that this user may not access.
    """
    if request.source == DIGITS:
        return DIGITS, DIGITS, []
    if request.source == PREVIOUS:
        return data_of_job(workspace, str(request.job or ""))
    if request.source == ZIP:
        return unpack(workspace, request.file)
    if request.source != FOLDER or workspace.user is not None:
        message = "folders of the server are available only without logins. Upload your images as a zip."
        raise OptionError(message, option="source", given=request.source)
    target = check_text(request.folder or "", "folder")
    if not target:
        message = "the folder is empty; expected a path such as /home/me/pets that has a folder for each class."
        raise OptionError(message, option="folder", given="")
    path = Path(target).expanduser().resolve()
    check_classes(str(path), target)
    return str(path), safe_name(path.name, "folder"), []


def data_of_job(workspace: Workspace, name: str) -> tuple[str, str, list[str]]:
    """Images of an earlier job."""
    job = workspace.job(name)
    if job.kind != KIND or len(job.command) < 2:
        message = "the run below has no labeled images. Choose other images."
        raise OptionError(message, option="job", given=name)
    check_classes(job.command[1], job.title)
    return job.command[1], job.title.rpartition(" · ")[0] or job.title, []


def unpack(workspace: Workspace, file: str | None) -> tuple[str, str, list[str]]:
    """Unpacks a zip into a folder named by its digest, so that later jobs on the same zip are comparable."""
    if not file:
        message = "no zip is chosen. Put the images of each class into a folder, zip the folders, and upload the zip."
        raise OptionError(message, option="file", given=None)
    path, left_out = Path(file), list[str]()
    name = safe_name(path.stem, "images")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    target = workspace.datasets / f"{name}-{digest}"
    if not target.is_dir():
        scratch = workspace.new_dataset()
        try:
            _, left_out = unpack_zip(path, scratch)
            inner = class_root(scratch)
            check_classes(str(inner), "the zip")
            inner.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return str(target), name, left_out


def class_root(folder: Path) -> Path:
    """Folder that contains the class folders; skips a single outer folder."""
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and all(each.is_dir() for each in entries[0].iterdir()):
        return entries[0] if entries[0].name.lower() not in ("train", "training") else folder
    return folder


def check_classes(data: str, name: str) -> None:
    """Checks that a data source has at least two classes, by file names only.

    Raises:
        VeneerError: it has fewer.
    """
    try:
        source = open_source(data)
    except DataError as error:
        raise VeneerError.from_error(error, str(error).replace(data, printable(name)), file=name) from error
    if len(source.classes) < 2:
        raise VeneerError(
            f"{printable(name)}: one class, {printable(source.classes[0])}; expected at least two, each a folder of images.",
            file=printable(name),
            where="classes",
            given=source.classes,
            expected=2,
        )
