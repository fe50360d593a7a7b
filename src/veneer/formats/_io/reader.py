"""Reads untrusted safetensors files: everything a header claims is checked before memory is allocated."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.injection import LoadError

from .header import parse, unique_keys
from .image_embeddings import is_image, read_embeddings
from .locations import SUFFIX as SUFFIX
from .locations import locate
from .mapped_tensors import MappedTensors, count_use

MAX_HEADER_BYTES, MAX_JSON = 16_000_000, 4_000_000  # bytes of a header, characters of a JSON value in it
INTEGER_SUFFIXES = (".alpha", ".on_input", ".scaled_oft")  # suffixes of names whose tensors may have an integer dtype
_PICKLE = """Pickles can run code when loaded, so veneer rejects them. If you trust the file, convert it once. For a LoRA:
  python -c "import torch; from safetensors.torch import save_file; save_file(torch.load('OLD', weights_only=True), 'NEW')"
for a token embedding:
  python -c "import torch; from safetensors.torch import save_file; \
torch.serialization.add_safe_globals([torch.nn.ParameterDict]); \
d = torch.load('OLD', weights_only=True); p = d.get('string_to_param', d); k = next(iter(p.keys())); \
save_file({str(d.get('name') or (k if p is d else 'NAME')).lower(): p[k].detach().clone()}, 'NEW')\""""


@dataclass(frozen=True)
class File:
    """A checked safetensors file.

    Args:
        path: location. `metadata`: of its header. `shapes`: of every tensor, by name, in the order of the header.
        held: the tensors themselves, if the source is not a safetensors file. `mapped`: those of a safetensors file.
    """

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    held: Mapping[str, Tensor] | None = None
    mapped: MappedTensors | None = None

    def tensors(
        self, finite: bool = True, names: Collection[str] | None = None, whole: tuple[str, ...] = INTEGER_SUFFIXES
    ) -> dict[str, Tensor]:
        """All tensors, or the named ones, on the CPU, in the order of the header; eight-bit floats are cast to float32.

        Args:
            whole: suffixes of names whose tensors may have an integer dtype.
        Raises:
            LoadError: `finite` is set and a tensor holds NaN or infinity in float32; or a tensor has an integer dtype.
        """
        selected = [name for name in self.shapes if names is None or name in names]
        try:
            found = {name: _cast_eight_bit(self._tensor(name)) for name in selected}
        except (ValueError, OSError) as error:
            message = f"{self.path}: cannot be read ({error}). Copy it again from its source."
            raise LoadError(message, file=self.path) from error
        counted = next((n for n, t in found.items() if not t.is_floating_point() and not n.endswith(whole)), None)
        if counted is not None:
            raise LoadError(
                f"{self.path}: '{counted}' has an integer dtype ({found[counted].dtype}); expected floating point. It is corrupt "
                "or quantized; save it in float16, bfloat16 or float32.",
                file=self.path,
                where=counted,
                given=found[counted].dtype,
            )
        bad = [name for name, tensor in found.items() if finite and not _is_finite_in_single(tensor)]
        if bad:
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            raise LoadError(
                f"{self.path}: NaN or infinity in {', '.join(bad[:8])}{more}: the training diverged. "
                "Use an earlier checkpoint, or pass strict=False to load it anyway.",
                file=self.path,
                where=bad[0],
                given=tuple(bad),
                expected="finite",
            )
        return found

    def _tensor(self, name: str) -> Tensor:
        if self.held is not None:
            return self.held[name]
        assert self.mapped is not None
        return self.mapped.tensor(name)

    def restrict(self, names: Collection[str]) -> File:
        """A view of the file restricted to the given tensors."""
        return dataclasses.replace(self, shapes={name: shape for name, shape in self.shapes.items() if name in names})

    def json(self, key: str) -> Any:
        """The JSON value under a metadata key, or None if it is missing.

        Raises:
            LoadError: the text is not valid JSON, or has duplicate keys.
        """
        if key not in self.metadata:
            return None
        return parse_json(self.metadata[key], f"{self.path}: metadata '{key}'", file=self.path, where=key)


def read_json(path: Path, largest: int) -> Any:
    """Reads an untrusted JSON file of at most `largest` bytes.

    Raises:
        LoadError: it cannot be read, or is not valid JSON in UTF-8.
    """
    try:
        with open(path, "rb") as opened:
            text = opened.read(largest + 1).decode()
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: invalid JSON ({error}); the file is corrupt.", file=path, expected="JSON") from error
    return parse_json(text, f"{path}: it", largest, file=path)


def parse_json(text: str, what: str, largest: int = MAX_JSON, **data: Any) -> Any:
    """Parses untrusted JSON text.

    Args:
        what: description of the text, for the error. `largest`: characters. `data`: attributes of the error.
    Raises:
        LoadError: it is invalid, too large, or has a duplicate key.
    """
    if len(text) > largest:
        message = f"{what} has {len(text):,} characters; at most {largest:,} are supported. The file is corrupt."
        raise LoadError(message, given=len(text), expected=largest, **data)
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # raises for a lone surrogate
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{what} is invalid JSON ({error}). The file is corrupt.", expected="JSON", **data) from error
    return found


def _cast_eight_bit(tensor: Tensor) -> Tensor:
    """Casts eight-bit floats to float32, which supports arithmetic."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _is_finite_in_single(tensor: Tensor) -> bool:
    """True if a tensor is finite in float32, the adapters' dtype, where large values of float64 become infinity."""
    finite = is_finite(tensor.float() if tensor.dtype == torch.float64 else tensor)
    count_use(tensor)
    return finite


def is_finite(tensor: Tensor) -> bool:
    """True if a tensor holds neither NaN nor infinity. Both propagate through a sum, which is faster than an elementwise test."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    into = torch.float32 if wide.dtype == torch.float16 else None  # float16 sums overflow early
    if wide.is_floating_point() and bool(torch.isfinite(wide.sum(dtype=into))):
        return True
    return bool(torch.isfinite(wide).all())  # the sum may overflow although all elements are finite


def read(path: str | PathLike[str]) -> File:
    """Opens a file, or the adapter in a folder, and checks its header against its length.

    Args:
        path: a file, with or without `.safetensors`, or a folder with `adapter.safetensors`, peft's
            `adapter_model.safetensors`, diffusers' `diffusion_pytorch_model.safetensors`, a ControlNeXt's
            `controlnet.safetensors`, or a single safetensors file; or a name on the hub, see `local_path`.
    Raises:
        LoadError: there is no such file, or it is not a complete safetensors file; the message says how to fix it.
        HubError: a name on the hub that cannot be downloaded.
    """
    found = locate(path)
    try:
        with open(found, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            if is_image(start):
                return _from_image(found)
            length = _read_header_length(found, start, size)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise LoadError(f"{found}: cannot be read ({error.strerror}).", file=found) from error
    return _parse(found, text, size - 8 - length)


def _from_image(path: Path) -> File:
    """Reads an image with an embedded token."""
    tensors = read_embeddings(path)
    return File(path, {}, {name: tuple(t.shape) for name, t in tensors.items()}, tensors)


def _read_header_length(path: Path, start: bytes, size: int) -> int:
    """Length of the header in bytes, or an error that identifies the kind of file."""
    wrong = _other_kind(path, start, size)
    if wrong:
        raise LoadError(f"{path}: {wrong[1]}", file=path, given=wrong[0], expected="safetensors")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8 or length > MAX_HEADER_BYTES or length < 2:
        raise LoadError(
            f"{path}: the header's length is {length:,} bytes, but the file has {size:,}. It is not a safetensors file, or it is "
            "truncated. Copy it again from its source.",
            file=path,
            where="header",
            given=length,
            expected=size - 8,
        )
    return length


def _other_kind(path: Path, start: bytes, size: int) -> tuple[str, str] | None:
    """Kind of a file that is not safetensors: one word, and a message."""
    if size < 8:
        return "short", f"only {size} bytes, too short for a safetensors file. Copy it again from its source."
    disguise = " under the name of a safetensors file" if path.suffix == SUFFIX else ""
    if start.startswith(b"PK\x03\x04"):
        return "zip", f"a zip archive, as torch.save writes{disguise}. {_pickle_message(path)}"
    # A header of 1,408 bytes also begins like a pickle, but is JSON from the ninth byte on.
    if start[0] == 0x80 and start[1] in range(2, 6) and start[8:9] != b"{":
        return "pickle", f"a pickle{disguise}. {_pickle_message(path)}"
    if start.startswith(b"version https://git-lfs"):
        return "git-lfs", "a Git LFS pointer, not the file itself. Run 'git lfs pull'."
    if all(32 <= c < 127 or c in b"\t\r\n" for c in start):
        first_line = start.decode("ascii").split("\n")[0][:40].strip()
        return (
            "text",
            f"a text file ('{first_line}…'), not safetensors; possibly a saved error page or pointer. Download it again.",
        )
    return None


def _pickle_message(path: Path) -> str:
    """Why pickles are rejected, and the command that converts one to safetensors."""
    new = path.with_suffix(SUFFIX) if path.suffix != SUFFIX else path.with_name(f"{path.stem}-converted{SUFFIX}")
    return _PICKLE.replace("OLD", str(path)).replace("NEW", str(new)).replace("NAME", f"<{path.stem.lower()}>")


def _parse(path: Path, text: bytes, space: int) -> File:
    try:
        header = parse(text)
        if header.needed == space:
            mapped = MappedTensors(path, 8 + len(text), header.entries)
            return File(path, header.metadata, header.shapes(), mapped=mapped)
    except (ValueError, RecursionError) as error:
        message = f"{path}: invalid safetensors header: {error}. Copy it again from its source."
        raise LoadError(message, file=path, where="header", expected="safetensors") from error
    short = "The file is truncated. Copy it again from its source." if header.needed > space else "The file is corrupt."
    message = f"{path}: its tensors need {header.needed:,} bytes, but {space:,} follow the header. {short}"
    raise LoadError(message, file=path, where="tensors", given=space, expected=header.needed)
