"""Safetensors and nothing else, read without trust: what a file claims is checked before anything is allocated."""

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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.injection import LoadError

from .header import parse, unique
from .image_embeddings import is_picture, words

SUFFIX = ".safetensors"
# what is meant by a folder: veneer's own, peft's, diffusers' for a whole network, and a ControlNeXt's beside weights of the base
NAMED = ("adapter.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors", "controlnet.safetensors")
LARGEST_HEADER, LARGEST_JSON = 16_000_000, 4_000_000  # bytes of a header, characters of a JSON text in it
WHOLE = (".alpha", ".on_input", ".scaled_oft")  # ends of names whose tensors may be whole numbers; all else of a layer is none
_PICKLE = """Pickles can run code when they are read, so they are refused. Convert it once, where you trust it. A LoRA:
  python -c "import torch; from safetensors.torch import save_file; save_file(torch.load('OLD', weights_only=True), 'NEW')"
a learned word:
  python -c "import torch; from safetensors.torch import save_file; \
torch.serialization.add_safe_globals([torch.nn.ParameterDict]); \
d = torch.load('OLD', weights_only=True); p = d.get('string_to_param', d); k = next(iter(p.keys())); \
save_file({str(d.get('name') or (k if p is d else 'NAME')).lower(): p[k].detach().clone()}, 'NEW')\""""


@dataclass(frozen=True)
class File:
    """A checked safetensors file.

    Args:
        path: where it is. `metadata`: the texts of its header. `shapes`: of every tensor, by name, in the order of the header.
        held: the tensors themselves, of what is no safetensors file.
    """

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    held: Mapping[str, Tensor] | None = None

    def tensors(
        self, finite: bool = True, names: Collection[str] | None = None, whole: tuple[str, ...] = WHOLE
    ) -> dict[str, Tensor]:
        """All tensors, or those of these names, on the CPU, in the order of the header; eight bits come as single precision.

        Args:
            whole: ends of names whose tensors may be whole numbers.
        Raises:
            LoadError: `finite` and a tensor holds NaN or infinity, in single precision; or one holds whole numbers.
        """
        wanted = [name for name in self.shapes if names is None or name in names]
        try:
            if self.held is not None:
                found = {name: self.held[name] for name in wanted}
            else:
                with safe_open(self.path, "pt") as file:
                    found = {name: _usable(file.get_tensor(name)) for name in wanted}
        except (SafetensorError, OSError) as error:
            message = f"{self.path}: cannot be read ({error}). Copy it again from its source."
            raise LoadError(message, file=self.path) from error
        counted = next((n for n, t in found.items() if not t.is_floating_point() and not n.endswith(whole)), None)
        if counted is not None:
            raise LoadError(
                f"{self.path}: '{counted}' holds whole numbers ({found[counted].dtype}); expected floating point. It is damaged, "
                "or quantised: save it in half or single precision.",
                file=self.path,
                where=counted,
                given=found[counted].dtype,
            )
        bad = [name for name, tensor in found.items() if finite and not is_finite(_single(tensor))]
        if bad:
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            raise LoadError(
                f"{self.path}: NaN or infinity in {', '.join(bad[:8])}{more}: the training that made it diverged. "
                "Use an earlier checkpoint, or pass strict=False to load it all the same.",
                file=self.path,
                where=bad[0],
                given=tuple(bad),
                expected="finite",
            )
        return found

    def only(self, names: Collection[str]) -> File:
        """The file as if it had no tensors but these."""
        return dataclasses.replace(self, shapes={name: shape for name, shape in self.shapes.items() if name in names})

    def json(self, key: str) -> Any:
        """The JSON value under a metadata key, or None if there is none.

        Raises:
            LoadError: the text is no JSON, or says one thing twice.
        """
        if key not in self.metadata:
            return None
        return from_json(self.metadata[key], f"{self.path}: the header's '{key}'", file=self.path, where=key)


def from_json(text: str, what: str, largest: int = LARGEST_JSON, **data: Any) -> Any:
    """The value of a JSON text.

    Args:
        what: what the text is, for the error. `largest`: characters. `data`: attributes of the error.
    Raises:
        LoadError: it is none, is larger, or has a key twice.
    """
    if len(text) > largest:
        message = f"{what} has {len(text):,} characters; at most {largest:,} are read. The file is damaged."
        raise LoadError(message, given=len(text), expected=largest, **data)
    try:
        found = json.loads(text, object_pairs_hook=unique)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{what} is not JSON ({error}). The file is damaged.", expected="JSON", **data) from error
    return found


def _usable(tensor: Tensor) -> Tensor:
    """Numbers of eight bits as single precision, which can be reckoned with."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _single(tensor: Tensor) -> Tensor:
    """Double precision as single, which adapters have: what is too large for it is infinity there."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def is_finite(tensor: Tensor) -> bool:
    """True if a tensor holds neither NaN nor infinity. Both outlive a sum, which is many times quicker than looking at each."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    into = torch.float32 if wide.dtype == torch.float16 else None  # sums of halves grow too large soon
    if wide.is_floating_point() and bool(torch.isfinite(wide.sum(dtype=into))):
        return True
    return bool(torch.isfinite(wide).all())  # the sum may be too large where no number is


def read(path: str | PathLike[str]) -> File:
    """Open a file, or the adapter in a folder, and check its header against its length.

    Args:
        path: a file, with or without `.safetensors`, or a folder with `adapter.safetensors`, peft's
            `adapter_model.safetensors`, diffusers' `diffusion_pytorch_model.safetensors`, a ControlNeXt's
            `controlnet.safetensors`, or one such file.
    Raises:
        LoadError: there is none, or it is no whole safetensors file: what was found, and what to do.
    """
    found = locate(path)
    try:
        with open(found, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            if is_picture(start):
                return _of_picture(found)
            length = _header_length(found, start, size)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise LoadError(f"{found}: cannot be read ({error.strerror}).", file=found) from error
    return _parse(found, text, size - 8 - length)


def _of_picture(path: Path) -> File:
    """A picture with a learned word in it."""
    held = words(path)
    return File(path, {}, {name: tuple(t.shape) for name, t in held.items()}, held)


def locate(path: str | PathLike[str]) -> Path:
    """The file that is meant by a path.

    Raises:
        LoadError: there is none, or a folder holds several and none is called `adapter.safetensors`.
    """
    path = Path(path)
    try:
        return _in_folder(path) if path.is_dir() else _file(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        message = f"{path}: cannot be looked for ({why}). Give the path of a file or a folder."
        raise LoadError(message, file=path) from error


def _in_folder(path: Path) -> Path:
    inside = sorted(p for p in path.iterdir() if p.suffix == SUFFIX and not p.name.startswith(".") and p.is_file())
    named = next((found for name in NAMED if (found := [p for p in inside if p.name == name])), inside)
    if len(named) == 1:
        return named[0]
    has = f"there are {', '.join(p.name for p in inside)}; name one" if inside else "there is no .safetensors file in it"
    message = f"{path}: a folder without adapter.safetensors; {has}."
    raise LoadError(message, file=path, given=tuple(p.name for p in inside), expected=1)


def _file(path: Path) -> Path:
    with_suffix = path.with_name(path.name + SUFFIX)
    if not path.exists() and with_suffix.is_file():
        return with_suffix
    if path.exists() and not path.is_file():
        message = f"{path}: no ordinary file, but a pipe or a device. Copy what it gives into a file."
        raise LoadError(message, file=path, expected="file")
    if not path.is_file():
        message = f"{path}: there is no such file, nor {with_suffix.name} beside it."
        raise LoadError(message, file=path, missing=[path.name, with_suffix.name])
    return path


def _header_length(path: Path, start: bytes, size: int) -> int:
    """Length of the header in bytes, or an error that says what the file is instead."""
    wrong = _something_else(path, start, size)
    if wrong:
        raise LoadError(f"{path}: {wrong[1]}", file=path, given=wrong[0], expected="safetensors")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8 or length > LARGEST_HEADER or length < 2:
        raise LoadError(
            f"{path}: its header claims {length:,} bytes and the file has {size:,}. It is no safetensors file, or it is cut "
            "short: copy it again from its source.",
            file=path,
            where="header",
            given=length,
            expected=size - 8,
        )
    return length


def _something_else(path: Path, start: bytes, size: int) -> tuple[str, str] | None:
    """What a file is that is no safetensors file: in one word, and as a message."""
    if size < 8:
        return "short", f"only {size} bytes, so no safetensors file. Copy it again from its source."
    named = " under the name of a safetensors file" if path.suffix == SUFFIX else ""
    if start.startswith(b"PK\x03\x04"):
        return "zip", f"a zip archive, as torch.save writes{named}. {_pickle(path)}"
    # A header of 1,408 bytes begins like a pickle, too; but it is JSON from the ninth byte on.
    if start[0] == 0x80 and start[1] in range(2, 6) and start[8:9] != b"{":
        return "pickle", f"a pickle{named}. {_pickle(path)}"
    if start.startswith(b"version https://git-lfs"):
        return "git-lfs", "a Git LFS pointer, not the file itself. Run 'git lfs pull'."
    if all(32 <= c < 127 or c in b"\t\r\n" for c in start):
        shown = start.decode("ascii").split("\n")[0][:40].strip()
        return "text", f"a text file ('{shown}…'), not safetensors. Was an error page or a pointer saved in its place?"
    return None


def _pickle(path: Path) -> str:
    """Why a pickle is refused, and what makes a safetensors file of it."""
    new = path.with_suffix(SUFFIX) if path.suffix != SUFFIX else path.with_name(f"{path.stem}-converted{SUFFIX}")
    return _PICKLE.replace("OLD", str(path)).replace("NEW", str(new)).replace("NAME", f"<{path.stem.lower()}>")


def _parse(path: Path, text: bytes, space: int) -> File:
    try:
        header = parse(text)
        if header.needed == space:
            return File(path, header.metadata, header.shapes())
    except (ValueError, RecursionError) as error:
        message = f"{path}: its header is not that of a safetensors file: {error}. Copy it again from its source."
        raise LoadError(message, file=path, where="header", expected="safetensors") from error
    short = "It is cut short: copy it again from its source." if header.needed > space else "It is damaged."
    message = f"{path}: its tensors need {header.needed:,} bytes and {space:,} follow the header. {short}"
    raise LoadError(message, file=path, where="tensors", given=space, expected=header.needed)
