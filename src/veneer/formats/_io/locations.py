"""Paths of adapter files: a file, the adapter in a folder, or a name on the hub, whose file is downloaded."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from veneer.hub.names import SUFFIX as SUFFIX
from veneer.hub.names import is_repository
from veneer.hub.repo_files import download_adapter
from veneer.injection import LoadError

# default files of a folder: veneer, peft, a whole diffusers network, and a ControlNeXt (which has base weights beside it)
DEFAULT_NAMES = (
    "adapter.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "controlnet.safetensors",
)


def local_path(path: str | PathLike[str]) -> Path:
    """Path on this machine of an adapter file or folder, which is downloaded if it is a name on the hub.

    Args:
        path: a local file, with or without `.safetensors`, or a local folder; else `USER/REPO`, `USER/REPO/FILE.safetensors`
            or one of these with `@REVISION`. A path that has no such form, or is in a local folder, is returned unchanged.
    Raises:
        HubError: no such repository or file, several safetensors files, only pickles, or an unreachable hub.
    """
    place = Path(path)
    if place.with_name(place.name + SUFFIX).is_file() or not is_repository(path):
        return place
    return download_adapter(place.as_posix(), DEFAULT_NAMES)


def locate(path: str | PathLike[str]) -> Path:
    """The file that a path or a name on the hub refers to.

    Raises:
        LoadError: it does not exist, or a folder holds several and none is called `adapter.safetensors`.
        HubError: as for `local_path`.
    """
    path = Path(path)
    try:
        path = local_path(path)
        return _locate_in_folder(path) if path.is_dir() else _locate_file(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        message = f"{path}: cannot be accessed ({why}). Give the path of a file or a folder."
        raise LoadError(message, file=path) from error


def _locate_in_folder(path: Path) -> Path:
    inside = sorted(p for p in path.iterdir() if p.suffix == SUFFIX and not p.name.startswith(".") and p.is_file())
    candidates = next((found for name in DEFAULT_NAMES if (found := [p for p in inside if p.name == name])), inside)
    if len(candidates) == 1:
        return candidates[0]
    has = f"it has {', '.join(p.name for p in inside)}; name one" if inside else "it has no .safetensors file"
    message = f"{path}: folder without adapter.safetensors; {has}."
    raise LoadError(message, file=path, given=tuple(p.name for p in inside), expected=1)


def _locate_file(path: Path) -> Path:
    with_suffix = path.with_name(path.name + SUFFIX)
    if not path.exists() and with_suffix.is_file():
        return with_suffix
    if path.exists() and not path.is_file():
        message = f"{path}: not a regular file, but a pipe or a device. Copy its content into a file."
        raise LoadError(message, file=path, expected="file")
    if not path.is_file():
        message = f"{path}: no such file, and no {with_suffix.name} beside it."
        raise LoadError(message, file=path, missing=[path.name, with_suffix.name])
    return path
