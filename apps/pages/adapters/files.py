"""What can be done with adapters' files: look, rename, convert, merge, resize. Each result is a file of the workspace."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from veneer.pipelines.convert import ConvertConfig, convert
from veneer.pipelines.generate import base_of
from veneer.pipelines.merge import MergeConfig, merge
from veneer.pipelines.resize import ResizeConfig, resize

import veneer
from veneer import base_models
from veneer.adapter_merging import is_mergeable
from veneer.formats import Look, look, native
from veneer.injection import OptionError, StateError, VeneerError

from ...limits import LIMITS
from ...uploads import take_adapter
from ...workspace import Workspace, bounded, safe, shown

SUFFIX = ".safetensors"
FOLDER = "peft_folder"
"""The format that is a folder: it is given as a zip, and not kept."""
EXAMPLE = "example-lora"


@dataclass(frozen=True)
class Outcome:
    """A new file.

    Args:
        name: in the workspace; None for what is not kept there. `report`: lines.
        file: to download. `words`: files of trained tokens beside it, where the format cannot hold them; the name of each is the
            token's trigger elsewhere.
    """

    name: str | None
    file: Path
    report: str
    words: tuple[Path, ...] = ()


def bring(workspace: Workspace, path: str | Path) -> str:
    """Keep an uploaded file; gives its name.

    Raises:
        VeneerError: it is no adapter that can be read: why, without the folder it was uploaded to.
    """
    path = Path(path)
    try:
        return take_adapter(path, workspace.adapters, path.name).stem
    except VeneerError as error:
        raise VeneerError.from_error(error, str(error).replace(f"{path.parent}/", ""), file=path.name) from error


def example(workspace: Workspace) -> str:
    """Put a LoRA of the bundled base with random values into the workspace, to try the page with; gives its name."""
    target = workspace.adapters / f"{EXAMPLE}{SUFFIX}"
    if not target.exists():
        _room(workspace)
        workspace.adapters.mkdir(parents=True, exist_ok=True)
        lora = veneer.attach(base_models.load("bundled"), "lora", rank=4)
        drawn = torch.Generator().manual_seed(0)
        for value in lora.parameters():
            value.data = torch.randn(value.shape, generator=drawn) * 0.02
        native.save(lora, target, {"base": "bundled"})
    return EXAMPLE


def seen(workspace: Workspace, name: str, base: str | None = None) -> Look:
    """What is in a file, and with a base how it fits.

    Raises:
        VeneerError: there is no such file or base, or the file is damaged.
    """
    file = workspace.adapter(name)
    return _said(workspace, lambda: look(file, base_models.load(base) if base else None))


def mergeable(workspace: Workspace) -> list[str]:
    """Names of the adapters that can be merged: weight updates of a pipeline and trained tokens."""
    return [name for name, path in workspace.all_adapters().items() if is_mergeable(path)]


def trained_on(workspace: Workspace, name: str) -> str | None:
    """The base that a file says it is for."""
    found = _said(workspace, lambda: base_of(workspace.adapter(name)))
    return found if isinstance(found, str) else None


def rename(workspace: Workspace, name: str, to: str) -> str:
    """Give a file another name; gives the name that it has then.

    Raises:
        VeneerError: it is a job's, the new name is taken, or there is nothing in it.
    """
    file, plain = _own(workspace, name), _plain(bounded(to, "The new name"))
    if not plain:
        raise OptionError("The new name is empty; expected letters or digits. Type one.", option="name", given="")
    target = workspace.adapters / f"{plain}{SUFFIX}"
    if target.exists() and not target.samefile(file):
        raise OptionError(f"There is {shown(plain)!r} already. Choose another name.", option="name", given=plain)
    file.rename(target)
    return target.stem


def delete(workspace: Workspace, name: str) -> None:
    """Delete a file for good.

    Raises:
        VeneerError: it is a job's, or there is none.
    """
    _own(workspace, name).unlink()


def converted(workspace: Workspace, name: str, to: str, base: str) -> Outcome:
    """A file in another format.

    Raises:
        VeneerError: it does not fit the base, or the format cannot hold it.
    """
    file = workspace.adapter(name)
    return _kept(workspace, f"{_plain(name)}-{to}", to, lambda out: convert(ConvertConfig(file, to, base, out)))


def merged(
    workspace: Workspace, names: Sequence[str], weights: Sequence[float], base: str, how: str, rank: float | None, to: str | None
) -> Outcome:
    """Several files as one LoRA.

    Raises:
        VeneerError: fewer than two or too many, a weight that is no number, or what cannot be combined so.
    """
    if not 2 <= len(names) <= LIMITS.adapters:
        message = f"{len(names)} adapters are chosen; expected 2 to {LIMITS.adapters}."
        raise OptionError(message, option="adapters", given=len(names), expected=(2, LIMITS.adapters))
    if len(weights) != len(names) or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        message = "A weight is missing; expected a number for each adapter, such as 1 or 0.5."
        raise OptionError(message, option="weights", given=tuple(weights), expected=len(names))
    given: dict[str, Any] = {"method": how, "base": base, "to": to or None, "rank": None if how == "sum" else _whole(rank)}
    files, words = tuple(map(workspace.adapter, names)), tuple(f"{w:g}" for w in weights)
    stem = "-and-".join(_plain(name)[:30] for name in names[:2])
    return _kept(workspace, f"{stem}-merged", to, lambda out: merge(MergeConfig(files, words, out=out, **given)))


def resized(workspace: Workspace, name: str, base: str, rank: float | None, energy: float | None, to: str | None) -> Outcome:
    """A file as a LoRA of another rank.

    Raises:
        VeneerError: no rank, or the file has none that can be changed.
    """
    file, given = workspace.adapter(name), _whole(rank)
    if given is None:
        message = "The new rank is missing; expected a whole number from 1, such as 4."
        raise OptionError(message, option="rank", given=None, expected=1)
    share = energy if energy and energy < 1 else None
    config = {"rank": given, "energy": share, "base": base, "to": to or None}
    made = f"{_plain(name)}-rank-{given}"
    return _kept(workspace, made, to, lambda out: resize(ResizeConfig(file, out=out, **config)))


def _whole(rank: float | None) -> int | None:
    if rank is None or not math.isfinite(rank):
        return None
    if rank != int(rank) or rank < 1:
        raise OptionError(f"The rank is {rank:g}; expected a whole number from 1.", option="rank", given=rank, expected=1)
    return int(rank)


def _kept(workspace: Workspace, stem: str, to: str | None, make: Any) -> Outcome:
    """Make a file under a name that is free, and say what was done without the workspace's folder."""
    if to == FOLDER:
        return _zipped(workspace, stem, make)
    _room(workspace)
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    target = workspace.adapters / f"{_free(workspace, _plain(stem))}{SUFFIX}"
    with tempfile.TemporaryDirectory(prefix=".making-", dir=workspace.folder) as scratch:
        made = Path(scratch) / target.name
        lines = _said(workspace, lambda: make(made), scratch)
        beside = sorted(path for path in Path(scratch).rglob(f"*{SUFFIX}") if path != made)
        for path in beside:
            take_adapter(path, workspace.adapters, path.name)
        folder = Path(tempfile.mkdtemp(prefix="veneer-")) if beside else Path()
        words = tuple(Path(shutil.move(path, folder / path.name)) for path in beside)
        shutil.move(made, target)
    report = _away(workspace, "\n".join(lines), scratch)
    return Outcome(target.stem, target, report, words)


def _zipped(workspace: Workspace, stem: str, make: Any) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="veneer-") as scratch:
        folder = Path(scratch) / _plain(stem)
        lines = _said(workspace, lambda: make(folder))
        beside = tempfile.mkdtemp(prefix="veneer-")
        packed = shutil.make_archive(str(Path(beside) / folder.name), "zip", scratch)
        report = "\n".join(line.replace(f"{scratch}/", "") for line in lines)
    return Outcome(None, Path(packed), f"{report}\nIt is a folder: download it as a zip; it is not kept here.")


def _said(workspace: Workspace, action: Any, *folders: str | Path) -> Any:
    """Do something; its errors name files without the workspace's and other `folders`."""
    try:
        return action()
    except (VeneerError, ValueError, OSError) as error:
        raise VeneerError.from_error(error, _away(workspace, str(error), *folders)) from error


def _away(workspace: Workspace, text: str, *folders: str | Path) -> str:
    for folder in (*folders, workspace.adapters, workspace.jobs, workspace.folder):
        text = text.replace(f"{folder}/", "")
    return text


def _own(workspace: Workspace, name: str) -> Path:
    file = workspace.adapter(name)
    if file.parent != workspace.adapters:
        message = f"{shown(name)!r} belongs to a job. It is renamed and deleted with it, on the page of that job."
        raise StateError(message, where=name, given="of a job")
    return file


def _room(workspace: Workspace) -> None:
    count = len(list(workspace.adapters.glob(f"*{SUFFIX}")))
    if count >= LIMITS.adapter_files:
        message = f"You keep {count} adapters; expected at most {LIMITS.adapter_files}. Delete one first."
        raise VeneerError(message, where="adapters", given=count, expected=LIMITS.adapter_files)


def _free(workspace: Workspace, stem: str) -> str:
    """A stem under which there is nothing yet."""
    taken = {path.name.casefold().removesuffix(SUFFIX) for path in workspace.adapters.iterdir()}
    tries = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in tries if name.casefold() not in taken)


def _plain(name: str) -> str:
    """A name that is a file's name and nothing else, without its ending."""
    return safe(f"{name.removesuffix(SUFFIX)}{SUFFIX}", "adapter").removesuffix(SUFFIX) if name.strip(" .-/\\") else ""
