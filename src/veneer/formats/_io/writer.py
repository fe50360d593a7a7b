"""Writes safetensors files atomically and deterministically."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.atomic_files import write_atomically
from veneer.injection import SaveError

from .mapped_tensors import DTYPES, count_use
from .reader import SUFFIX, is_finite

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")  # of the library: aligned


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
        tensors: by name. They are read one by one, first all for the header and then all for the file, so that a mapping can
            compute them when they are read.
        hashes: metadata entries to add with the SHA-256 of the tensors -> prefix of the digest.
    Raises:
        SaveError: a tensor is not finite or on `meta`, or writing fails; an existing file at `path` stays unchanged.
    """
    kinds = {name: _reject_unusable(path, name, tensors[name]) for name in tensors}
    names = sorted(tensors, key=lambda name: (ORDER.index(kinds[name][0]), name))
    digest = _sha256(tensors[name] for name in names) if hashes else ""
    entries = {**metadata, **{key: prefix + digest for key, prefix in (hashes or {}).items()}}
    head = _header({name: kinds[name] for name in names}, entries)
    size = len(head) + sum(nbytes for _, _, nbytes in kinds.values())
    return _replace(path, itertools.chain([head], (_to_bytes(tensors[name]) for name in names)), size)


def reject_unusable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises `SaveError` if a tensor is not finite or on `meta`."""
    for name, tensor in tensors.items():
        _reject_unusable(path, name, tensor)


def _reject_unusable(path: Path, name: str, tensor: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and number of bytes of a tensor for the header, if it can be written."""
    if tensor.is_meta:
        message = f"{path}: '{name}' is on the meta device and has no values. Load the base weights first."
        raise SaveError(message, file=path, where=name, given="meta")
    if not is_finite(tensor):
        message = f"{path}: '{name}' holds NaN or infinity: the training diverged. Nothing was written."
        raise SaveError(message, file=path, where=name, expected="finite")
    if tensor.dtype not in NAMES:
        message = f"{path}: '{name}' has the dtype {tensor.dtype}; expected one of {', '.join(map(str, NAMES))}."
        raise SaveError(message, file=path, where=name, given=tensor.dtype, expected=tuple(NAMES))
    count_use(tensor)
    return NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes


def write_text(path: Path, text: str) -> Path:
    """Writes a text file atomically.

    Raises:
        SaveError: writing fails; an existing file at `path` stays unchanged.
    """
    data = text.encode()
    return _replace(path, [data], len(data))


def _replace(path: Path, parts: Iterable[bytes | memoryview], size: int) -> Path:
    try:
        write_atomically(path, parts)
    except OSError as error:
        raise SaveError(
            f"{path}: cannot write {size:,} bytes ({error.strerror or error}); an existing file is unchanged. "
            "Free some space, or save to another folder.",
            file=path,
            given=error.errno,
            expected=size,
        ) from error
    return path


def _sha256(tensors: Iterable[Tensor]) -> str:
    """Digest of the bytes of all tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_to_bytes(tensor))
    return digest.hexdigest()


def _header(kinds: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header's length and the header, with metadata and tensors in the given order; the library shuffles metadata."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, nbytes) in kinds.items():
        start, end = end, end + nbytes
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def _to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous on the CPU."""
    count_use(tensor)
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def add_state(state: Mapping[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> dict[str, str]:
    """Adds a state to the tensors of a file, each storage once. Returns the names of those that are there by another name."""
    first = {_storage(t): key for key, t in tensors.items() if t.numel()}
    shared: dict[str, str] = {}
    for key, tensor in state.items():
        place = _storage(tensor)
        if tensor.numel() and not tensor.is_meta and place in first:
            shared[key] = first[place]
        else:
            first[place] = prefix + key
            tensors[prefix + key] = tensor
    return shared


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), str(tensor.device), tensor.dtype, tuple(tensor.shape), tensor.stride()
