"""Writes safetensors files atomically and deterministically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import safetensors.torch
from torch import Tensor

from veneer.atomic_files import write_atomically
from veneer.injection import SaveError

from .reader import SUFFIX, is_finite


def destination(path: str | PathLike[str], usual: str) -> Path:
    """The file that a path refers to: `usual` inside an existing folder, else the path with `.safetensors`."""
    path = Path(path)
    if path.is_dir():
        return path / usual
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], hashes: Mapping[str, str] | None = None
) -> Path:
    """Writes to a temporary file beside `path`, syncs, and renames it.

    Args:
        hashes: see `serialize`.
    Raises:
        SaveError: a tensor is not finite or on `meta`, or writing fails; an existing file at `path` stays unchanged.
    """
    reject_unusable(path, tensors)
    return _replace(path, serialize(tensors, metadata, hashes))


def reject_unusable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises `SaveError` if a tensor is not finite or on `meta`."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            message = f"{path}: '{name}' is on the meta device and has no values. Load the base weights first."
            raise SaveError(message, file=path, where=name, given="meta")
        if not is_finite(tensor):
            message = f"{path}: '{name}' holds NaN or infinity: the training diverged. Nothing was written."
            raise SaveError(message, file=path, where=name, expected="finite")


def write_text(path: Path, text: str) -> Path:
    """Writes a text file atomically.

    Raises:
        SaveError: writing fails; an existing file at `path` stays unchanged.
    """
    return _replace(path, [text.encode()])


def _replace(path: Path, parts: Sequence[bytes | memoryview]) -> Path:
    try:
        write_atomically(path, *parts)
    except OSError as error:
        size = sum(map(len, parts))
        raise SaveError(
            f"{path}: cannot write {size:,} bytes ({error.strerror or error}); an existing file is unchanged. "
            "Free some space, or save to another folder.",
            file=path,
            given=error.errno,
            expected=size,
        ) from error
    return path


def serialize(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], hashes: Mapping[str, str] | None = None
) -> tuple[bytes, memoryview]:
    """Header and tensors of a safetensors file, with metadata in the given order; the library shuffles it, so its files are not
    reproducible.

    Args:
        hashes: metadata entries to add with the SHA-256 of the tensors -> prefix of the digest.
    """
    data = safetensors.torch.save(_separate(tensors))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content = memoryview(data)[8 + length :]
    digest = hashlib.sha256(content).hexdigest() if hashes else ""
    entries = {**metadata, **{key: prefix + digest for key, prefix in (hashes or {}).items()}}
    text = json.dumps({"__metadata__": entries, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text, content


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each with a storage of its own, as the library requires; copied where needed."""
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate
