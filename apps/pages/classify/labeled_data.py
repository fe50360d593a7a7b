"""Labeled images of the page Classify: the built-in digits, an uploaded zip, a folder, or those of an earlier run."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from veneer.classification.data.sources import open_source
from veneer.injection import OptionError, VeneerError
from veneer.training.data.image_io import DataError

from ...workspace import Workspace, check_text, printable, safe_name
from ...zip_archives import read_zip, shorten, unpack_zip
from .label_tables import table_or_folder, write_metadata

KIND = "classify"
MULTI_LABEL = "--multi-label"
DIGITS, ZIP, FOLDER, PREVIOUS = "digits", "zip", "folder", "again"
SOURCES = {
    DIGITS: "Handwritten digits (built in)",
    ZIP: "My images, in a zip",
    FOLDER: "A folder on this machine",
    PREVIOUS: "The images of the run below",
}


@dataclass(frozen=True)
class LabeledData:
    """Images of a request.

    Args:
        data: the argument of `veneer transfer`. `name`: shown to users. `left_out`: why images were rejected.
        multi_label: whether an image may have several labels.
    """

    data: str
    name: str
    left_out: tuple[str, ...] = ()
    multi_label: bool = False


def is_multi_label(workspace: Workspace, source: str, job: str | None, multi_label: bool) -> bool:
    """Whether the images may have several labels: as the form says, or as in the run below."""
    if source == PREVIOUS:
        return MULTI_LABEL in workspace.job(str(job or "")).command
    return multi_label and source in (ZIP, FOLDER)


def resolve_data(
    workspace: Workspace,
    source: str,
    file: str | None = None,
    folder: str = "",
    job: str | None = None,
    multi_label: bool = False,
) -> LabeledData:
    """Resolves an image source.

    Args:
        source: a key of `SOURCES`. `file`: the zip. `folder`: on this machine. `job`: whose images are used again.
        multi_label: whether the images of a zip or folder may have several labels.
    Raises:
        VeneerError: fewer than two classes of images, or a source that this user may not access.
    """
    if source == DIGITS:
        return LabeledData(DIGITS, DIGITS)
    if source == PREVIOUS:
        return data_of_job(workspace, str(job or ""))
    if source == ZIP:
        return unpack(workspace, file, multi_label)
    if source != FOLDER or workspace.user is not None:
        message = "folders of the server are available only without logins. Upload your images as a zip."
        raise OptionError(message, option="source", given=source)
    target = check_text(folder or "", "folder")
    if not target:
        message = "the folder is empty; expected a path such as /home/me/pets that has a folder for each class."
        raise OptionError(message, option="folder", given="")
    path = Path(target).expanduser().resolve()
    name = safe_name(path.name, "folder")
    path = table_or_folder(path) if multi_label else path
    check_classes(str(path), target, multi_label)
    return LabeledData(str(path), name, multi_label=multi_label)


def data_of_job(workspace: Workspace, name: str) -> LabeledData:
    """Images of an earlier job."""
    job = workspace.job(name)
    if job.kind != KIND or len(job.command) < 2:
        message = "the run below has no labeled images. Choose other images."
        raise OptionError(message, option="job", given=name)
    multi_label = MULTI_LABEL in job.command
    check_classes(job.command[1], job.title, multi_label)
    return LabeledData(job.command[1], job.title.rpartition(" · ")[0] or job.title, multi_label=multi_label)


def unpack(workspace: Workspace, file: str | None, multi_label: bool = False) -> LabeledData:
    """Unpacks a zip into a folder named by its digest, so that later jobs on the same zip are comparable."""
    if not file:
        message = "no zip is chosen. Put the images of each class into a folder, zip the folders, and upload the zip."
        if multi_label:
            message = "no zip is chosen. Zip the images with a table labels.csv, and upload the zip."
        raise OptionError(message, option="file", given=None)
    path, left_out = Path(file), list[str]()
    name = safe_name(path.stem, "images")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    target = workspace.datasets / f"{name}-{digest}{'-labels' if multi_label else ''}"
    if not target.is_dir():
        scratch = workspace.new_dataset()
        try:
            if multi_label:
                content = read_zip(path, scratch, tables=True)
                left_out = [*shorten(content.reasons), *write_metadata(content, scratch)]
            else:
                _, left_out = unpack_zip(path, scratch)
            inner = scratch if multi_label else class_root(scratch)
            check_classes(str(inner), "the zip", multi_label)
            inner.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return LabeledData(str(target), name, tuple(left_out), multi_label)


def class_root(folder: Path) -> Path:
    """Folder that contains the class folders; skips a single outer folder."""
    entries = list(folder.iterdir())
    if len(entries) == 1 and entries[0].is_dir() and all(each.is_dir() for each in entries[0].iterdir()):
        return entries[0] if entries[0].name.lower() not in ("train", "training") else folder
    return folder


def check_classes(data: str, name: str, multi_label: bool = False) -> None:
    """Checks that a data source has at least two classes, by file names and tables only.

    Raises:
        VeneerError: it has fewer.
    """
    try:
        source = open_source(data, multi_label)
    except DataError as error:
        message = str(error).replace(data, printable(name))
        if multi_label and error.where in ("classes", "labels"):
            message = f"{printable(name)}: no table of labels; expected labels.csv with the columns path and labels."
        raise VeneerError.from_error(error, message, file=name) from error
    if len(source.classes) < 2:
        raise VeneerError(
            f"{printable(name)}: one class, {printable(source.classes[0])}; expected at least two, each a folder of images.",
            file=printable(name),
            where="classes",
            given=source.classes,
            expected=2,
        )
