"""Adapter files and datasets of the hub, downloaded into its local cache, which is used alone while the hub is unreachable."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer.injection.errors import VeneerError

from .connection import hub
from .errors import HubError, hub_error
from .names import PICKLES, SUFFIX, RepoName, parse_name

COMPANIONS = ("adapter_config.json", "config.json", "model.json", "unet.safetensors")
"""Files beside an adapter file that belong to it: configs of peft, diffusers and classifiers, a ControlNeXt's base weights."""
DATASET_PATTERNS = tuple(
    f"*{suffix}"
    for end in ("jpg", "jpeg", "png", "webp", "bmp", "csv", "jsonl", "parquet")
    for suffix in (f".{end}", f".{end.upper()}")
)
"""Files of a dataset that `veneer transfer` reads."""

Choose = Callable[[Sequence[str]], Sequence[str]]
"""Names of a repository's files -> those to download, the wanted one first."""


def download_adapter(name: str, defaults: Sequence[str]) -> Path:
    """Local path of an adapter file of the hub, and its configs beside it.

    Args:
        name: `USER/REPO[/FILE][@REVISION]`. `defaults`: file names of which the first that a repository has is taken.
    Raises:
        HubError: no such repository, revision or file; several safetensors files, which are in `expected`; only pickles; or the
            hub is unreachable and the local cache has no copy.
    """
    parsed = parse_name(name)
    if parsed is None:
        raise HubError(f"hub: {name!r} is no hub name; expected USER/REPO[/FILE][@REVISION].", where="name", given=name)
    if parsed.file is not None and not parsed.file.endswith(SUFFIX):
        raise _only_pickles(name, [parsed.file])

    def choose(names: Sequence[str]) -> Sequence[str]:
        file = parsed.file or choose_adapter(name, names, defaults)
        if file not in names:
            known = tuple(sorted(each for each in names if each.endswith(SUFFIX)))
            message = f"hub: {name!r}: no such file; {parsed.repo} has {', '.join(known) or f'no {SUFFIX} file'}."
            raise HubError(message, where="file", given=name, expected=known)
        folder = file.rpartition("/")[0]
        beside = [f"{folder}/{each}" if folder else each for each in COMPANIONS]
        return [file, *(each for each in beside if each in names and each != file)]

    folder, files = _download(parsed, name, "model", choose)
    return folder / files[0]


def choose_adapter(name: str, names: Sequence[str], defaults: Sequence[str]) -> str:
    """The adapter file among the files of a repository: a default name at the top, else the only safetensors file.

    Raises:
        HubError: several safetensors files, or none.
    """
    found = [each for each in names if each.endswith(SUFFIX)]
    top = [each for each in found if "/" not in each]
    for candidates in ([each for each in defaults if each in top][:1], top, found):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            message = f"hub: {name!r} has {len(candidates)} safetensors files; name one: {', '.join(sorted(candidates))}."
            raise HubError(message, where="file", given=name, expected=tuple(sorted(candidates)))
    pickles = [each for each in names if each.endswith(PICKLES)]
    if pickles:
        raise _only_pickles(name, pickles)
    message = f"hub: {name!r} has no safetensors file; it has {', '.join(names) or 'no files'}."
    raise HubError(message, where="file", given=name, expected=SUFFIX)


def download_dataset(name: str) -> Path:
    """Local folder of a dataset of the hub: its images, tables and Parquet files.

    Raises:
        HubError: no such dataset, none of these files, or the hub is unreachable and the local cache has no copy.
    """
    parsed = parse_name(name)
    if parsed is None or parsed.file is not None:
        message = f"hub: {name!r} is no name of a dataset; expected USER/DATASET[@REVISION]."
        raise HubError(message, where="name", given=name, expected="USER/DATASET")

    def choose(names: Sequence[str]) -> Sequence[str]:
        found = [each for each in names if each.endswith(tuple(pattern[1:] for pattern in DATASET_PATTERNS))]
        if not found:
            message = (
                f"hub: the dataset {name!r} has no images, CSV, JSONL or Parquet files; expected a folder of CLASS/IMAGE, "
                "images with metadata.csv, or Parquet files. Download and unpack it, and pass the folder."
            )
            raise HubError(message, where="files", given=name, expected=DATASET_PATTERNS)
        return found

    return _download(parsed, name, "dataset", choose)[0]


def _download(parsed: RepoName, name: str, kind: str, choose: Choose) -> tuple[Path, Sequence[str]]:
    """Folder of a repository in the local cache, and the chosen files in it."""
    try:
        import huggingface_hub
    except ImportError as error:
        message = (
            f"hub: {name!r} needs huggingface_hub, which is not installed. pip install huggingface_hub, or pass a local file."
        )
        raise HubError(message, where="library", given=name, expected="huggingface_hub") from error
    where: dict[str, Any] = {"repo_id": parsed.repo, "repo_type": kind, "revision": parsed.revision}
    with hub() as why:
        try:
            if why:
                folder = Path(huggingface_hub.snapshot_download(**where, local_files_only=True, allow_patterns=[]))
                return folder, choose(_files_below(folder))
            chosen = choose(huggingface_hub.HfApi().list_repo_files(**where))
            if kind == "model":  # few files: without the progress bar of a snapshot
                files = [Path(huggingface_hub.hf_hub_download(**where, filename=file)) for file in chosen]
                return files[0].parents[chosen[0].count("/")], chosen
            return Path(huggingface_hub.snapshot_download(**where, allow_patterns=[glob.escape(file) for file in chosen])), chosen
        except VeneerError:
            raise
        except Exception as error:  # the hub's client raises a dozen kinds, of several libraries
            if why:
                raise _offline(name, why) from error
            raise hub_error(error, name, "read") from error


def _files_below(folder: Path) -> list[str]:
    """Paths of all files of a cached snapshot."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _offline(name: str, why: str) -> HubError:
    message = (
        f"hub: {name!r} is neither a local file or folder nor in the local cache, and {why}. Check the path, or run the command "
        "once with a connection: later runs read the local cache."
    )
    return HubError(message, where="hub", given=name, expected="connection")


def _only_pickles(name: str, files: Sequence[str]) -> HubError:
    message = (
        f"hub: {name!r}: {', '.join(files)} may be a pickle, which can run code when loaded, so it is rejected; expected "
        f"a {SUFFIX} file. Ask for one in the repository's discussions, or convert a file that you trust: see docs/formats.md."
    )
    return HubError(message, where="pickle", given=name, expected=SUFFIX)
