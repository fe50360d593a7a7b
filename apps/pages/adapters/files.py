"""Operations on adapter files: inspect, rename, delete, convert, merge and resize. Results are stored in the workspace."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from veneer.pipelines.convert import ConvertConfig, base_of, convert, open_base
from veneer.pipelines.merge import MergeConfig, merge
from veneer.pipelines.resize import ResizeConfig, resize

import veneer
from veneer import base_models, formats
from veneer.adapter_merging import is_mergeable
from veneer.formats import DEFAULT_NAMES, FileSummary, native
from veneer.hub import download_adapter, parse_name
from veneer.injection import OptionError, StateError, VeneerError

from ...base_access import check_adapter_name
from ...limits import LIMITS
from ...uploads import store_adapter
from ...workspace import Workspace, check_text, printable, safe_name

SUFFIX = ".safetensors"
FOLDER = "peft_folder"
"""Format that is a folder; it is downloaded as a zip and not stored."""
EXAMPLE = "example-lora"


@dataclass(frozen=True)
class ConversionResult:
    """A created file.

    Args:
        name: in the workspace; None if it is not stored there. `report`: output of the command.
        file: to download. `embeddings`: separate files of token embeddings for formats that cannot contain them; the trigger
            is the file name.
    """

    name: str | None
    file: Path
    report: str
    embeddings: tuple[Path, ...] = ()


def store_upload(workspace: Workspace, path: str | Path) -> str:
    """Stores an uploaded file; returns its name.

    Raises:
        VeneerError: not a readable adapter; the message omits the upload folder.
    """
    path = Path(path)
    workspace.check_storage(path.stat().st_size)
    try:
        return store_adapter(path, workspace.adapters, path.name).stem
    except VeneerError as error:
        raise VeneerError.from_error(error, str(error).replace(f"{path.parent}/", ""), file=path.name) from error


def store_download(workspace: Workspace, name: str) -> str:
    """Stores an adapter of the hub, `USER/REPO[/FILE][@REVISION]`; returns its name.

    Raises:
        VeneerError: not such a name, no such repository or file, an unreachable hub, or a server that does not download.
    """
    parsed = parse_name(check_adapter_name(check_text(name, "hub name")))
    assert parsed is not None
    file = download_adapter(str(parsed), DEFAULT_NAMES)
    workspace.check_storage(file.stat().st_size)
    return store_adapter(file, workspace.adapters, f"{parsed.repo.replace('/', '-')}.safetensors").stem


def example(workspace: Workspace) -> str:
    """Creates an example LoRA with random weights for the bundled base model; returns its name."""
    target = workspace.adapters / f"{EXAMPLE}{SUFFIX}"
    if not target.exists():
        _check_count(workspace)
        workspace.adapters.mkdir(parents=True, exist_ok=True)
        lora = veneer.attach(base_models.load("bundled"), "lora", rank=4)
        generator = torch.Generator().manual_seed(0)
        for value in lora.parameters():
            value.data = torch.randn(value.shape, generator=generator) * 0.02
        native.save(lora, target, {"base": "bundled"})
    return EXAMPLE


def inspect(workspace: Workspace, name: str, base: str | None = None) -> FileSummary:
    """Inspects a file, and with a base model its compatibility.

    Raises:
        VeneerError: unknown file or base model, or a corrupt file.
    """
    file = workspace.adapter(name)
    return _hide_folders(workspace, lambda: formats.inspect(file, open_base(base, [file], "inspect")[0] if base else None))


def mergeable_adapters(workspace: Workspace) -> list[str]:
    """Names of the adapters that can be merged: weight updates of a pipeline and token embeddings."""
    return [name for name, path in workspace.all_adapters().items() if is_mergeable(path)]


def base_of_adapter(workspace: Workspace, name: str) -> str | None:
    """Base model stated in a file."""
    found = _hide_folders(workspace, lambda: base_of(workspace.adapter(name)))
    return found if isinstance(found, str) else None


def rename(workspace: Workspace, name: str, to: str) -> str:
    """Renames a file; returns the new name.

    Raises:
        VeneerError: the file belongs to a job, or the new name is empty or already used.
    """
    file, plain = _own_file(workspace, name), _plain_stem(check_text(to, "new name"))
    if not plain:
        raise OptionError("the new name is empty; expected letters or digits.", option="name", given="")
    target = workspace.adapters / f"{plain}{SUFFIX}"
    if target.exists() and not target.samefile(file):
        raise OptionError(f"the name {printable(plain)!r} is already used. Choose another.", option="name", given=plain)
    file.rename(target)
    return target.stem


def delete(workspace: Workspace, name: str) -> None:
    """Deletes a file.

    Raises:
        VeneerError: unknown file, or one that belongs to a job or that a waiting or running job trains from.
    """
    file = _own_file(workspace, name)
    workspace.check_unused(file)
    file.unlink()


def convert_adapter(workspace: Workspace, name: str, to: str, base: str) -> ConversionResult:
    """Converts a file to another format.

    Raises:
        VeneerError: the file is incompatible with the base model, or the format does not support it.
    """
    file = workspace.adapter(name)
    return _store_result(workspace, f"{_plain_stem(name)}-{to}", to, lambda out: convert(ConvertConfig(file, to, base, out)))


def merge_adapters(
    workspace: Workspace, names: Sequence[str], weights: Sequence[float], base: str, how: str, rank: float | None, to: str | None
) -> ConversionResult:
    """Merges files into one LoRA.

    Raises:
        VeneerError: fewer than two or too many files, an invalid weight, or files that cannot be merged this way.
    """
    if not 2 <= len(names) <= LIMITS.adapters:
        message = f"{len(names)} adapters are selected; expected 2 to {LIMITS.adapters}."
        raise OptionError(message, option="adapters", given=len(names), expected=(2, LIMITS.adapters))
    if len(weights) != len(names) or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        message = "a weight is missing; expected a number for each adapter, such as 1 or 0.5."
        raise OptionError(message, option="weights", given=tuple(weights), expected=len(names))
    options: dict[str, Any] = {"method": how, "base": base, "to": to or None, "rank": None if how == "sum" else _parse_rank(rank)}
    files, words = tuple(map(workspace.adapter, names)), tuple(f"{w:g}" for w in weights)
    stem = "-and-".join(_plain_stem(name)[:30] for name in names[:2])
    return _store_result(workspace, f"{stem}-merged", to, lambda out: merge(MergeConfig(files, words, out=out, **options)))


def resize_adapter(
    workspace: Workspace, name: str, base: str, rank: float | None, energy: float | None, to: str | None
) -> ConversionResult:
    """Resizes a LoRA to another rank.

    Raises:
        VeneerError: an invalid rank, or a file that cannot be resized.
    """
    file, new_rank = workspace.adapter(name), _parse_rank(rank)
    if new_rank is None:
        message = "the new rank is missing; expected a whole number from 1, such as 4."
        raise OptionError(message, option="rank", given=None, expected=1)
    share = energy if energy and energy < 1 else None
    config = {"rank": new_rank, "energy": share, "base": base, "to": to or None}
    stem = f"{_plain_stem(name)}-rank-{new_rank}"
    return _store_result(workspace, stem, to, lambda out: resize(ResizeConfig(file, out=out, **config)))


def _parse_rank(rank: float | None) -> int | None:
    if rank is None or not math.isfinite(rank):
        return None
    if rank != int(rank) or rank < 1:
        raise OptionError(f"the rank is {rank:g}; expected a whole number from 1.", option="rank", given=rank, expected=1)
    return int(rank)


def _store_result(workspace: Workspace, stem: str, to: str | None, make: Any) -> ConversionResult:
    """Creates a file under an unused name; the report omits the folders of the workspace."""
    if to == FOLDER:
        return _zip_result(workspace, stem, make)
    _check_count(workspace)
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    target = workspace.adapters / f"{_free_stem(workspace, _plain_stem(stem))}{SUFFIX}"
    with tempfile.TemporaryDirectory(prefix=".making-", dir=workspace.folder) as scratch:
        target_ = Path(scratch) / target.name
        lines = _hide_folders(workspace, lambda: make(target_), scratch)
        extra = sorted(path for path in Path(scratch).rglob(f"*{SUFFIX}") if path != target_)
        for path in extra:
            store_adapter(path, workspace.adapters, path.name)
        folder = Path(tempfile.mkdtemp(prefix="veneer-")) if extra else Path()
        words = tuple(Path(shutil.move(path, folder / path.name)) for path in extra)
        shutil.move(target_, target)
    report = _strip_folders(workspace, "\n".join(lines), scratch)
    return ConversionResult(target.stem, target, report, words)


def _zip_result(workspace: Workspace, stem: str, make: Any) -> ConversionResult:
    with tempfile.TemporaryDirectory(prefix="veneer-") as scratch:
        folder = Path(scratch) / _plain_stem(stem)
        lines = _hide_folders(workspace, lambda: make(folder))
        extra = tempfile.mkdtemp(prefix="veneer-")
        packed = shutil.make_archive(str(Path(extra) / folder.name), "zip", scratch)
        report = "\n".join(line.replace(f"{scratch}/", "") for line in lines)
    return ConversionResult(
        None, Path(packed), f"{report}\nThis format is a folder: download it as a zip; it is not stored here."
    )


def _hide_folders(workspace: Workspace, action: Any, *folders: str | Path) -> Any:
    """Runs an action; its errors omit the folders of the workspace and `folders`."""
    try:
        return action()
    except (VeneerError, ValueError, OSError) as error:
        raise VeneerError.from_error(error, _strip_folders(workspace, str(error), *folders)) from error


def _strip_folders(workspace: Workspace, text: str, *folders: str | Path) -> str:
    for folder in (*folders, workspace.adapters, workspace.jobs, workspace.folder):
        text = text.replace(f"{folder}/", "")
    return text


def _own_file(workspace: Workspace, name: str) -> Path:
    file = workspace.adapter(name)
    if file.parent != workspace.adapters:
        message = f"{printable(name)!r} belongs to a job. Delete the job on its page instead."
        raise StateError(message, where=name, given="of a job")
    return file


def _check_count(workspace: Workspace) -> None:
    count = len(list(workspace.adapters.glob(f"*{SUFFIX}")))
    if count >= LIMITS.adapter_files:
        message = f"you have {count} adapters; expected at most {LIMITS.adapter_files}. Delete one first."
        raise VeneerError(message, where="adapters", given=count, expected=LIMITS.adapter_files)


def _free_stem(workspace: Workspace, stem: str) -> str:
    """An unused file stem."""
    taken = {path.name.casefold().removesuffix(SUFFIX) for path in workspace.adapters.iterdir()}
    tries = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in tries if name.casefold() not in taken)


def _plain_stem(name: str) -> str:
    """Safe file stem of a display name."""
    return safe_name(f"{name.removesuffix(SUFFIX)}{SUFFIX}", "adapter").removesuffix(SUFFIX) if name.strip(" .-/\\") else ""
