"""Native adapter files without their base model: read together, compared, and what is shared of their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.formats._core.stored_adapters import StoredFile, read_native
from veneer.injection.errors import OptionError

from .delta_weights import CombineError


def read_files(paths: Sequence[Path]) -> list[StoredFile]:
    """Reads native files of adapters for one base model.

    Raises:
        LoadError: a file is of another format or corrupt. OptionError: fewer than two files.
        CombineError: two files are for different base models; `where` is the class, config or fingerprint that differs.
    """
    if len(paths) < 2:
        raise OptionError.of("merge", "files", tuple(map(str, paths)), "at least two native files")
    files = [read_native(path) for path in paths]
    for other in files[1:]:
        _compare_bases(files[0], other)
    return files


def _compare_bases(first: StoredFile, other: StoredFile) -> None:
    if first.header["base"].keys() != other.header["base"].keys():
        raise differs("components", first, other, [*other.header["base"]], [*first.header["base"]])
    for component, base in first.header["base"].items():
        another = other.header["base"][component]
        for key in ("class", "config", "fingerprint"):
            comparable = key != "fingerprint" or base["without"] == another["without"]
            if comparable and None not in (base.get(key), another.get(key)) and base[key] != another[key]:
                raise differs(key, first, other, another[key], base[key])


def differs(where: str, first: StoredFile, other: StoredFile, given: Any, expected: Any) -> CombineError:
    """The error for two files that have another method, base model or shape."""
    texts = [text if len(text := str(value)) <= 80 else f"{text[:80]}…" for value in (given, expected)]
    message = f"{other.path}: {where} is {texts[0]}; {first.path} has {texts[1]}. Choose adapters of one base model and method."
    return CombineError(message, file=other.path, where=where, given=given, expected=expected)


def merged_header(files: Sequence[StoredFile], how: str, weights: Sequence[float] | None) -> dict[str, Any]:
    """Header of a file made of several: that of the last one, whose head it has, with its origin."""
    header: Mapping[str, Any] = files[-1].header
    record = {"merged": [Path(each.path).name for each in files], "how": how, "weights": list(weights or ())}
    return {"version": header["version"], "veneer": header["veneer"], "base": header["base"], "provenance": record}
