"""Several adapter files as one file whose adapters run in a composition."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.formats._core.attach import is_head_method
from veneer.formats._core.stored_adapters import StoredFile, write_native
from veneer.injection.composition.compose import parallel_of
from veneer.injection.composition.nodes import Average, Node, Parallel, Stack, node_from_json
from veneer.injection.errors import OptionError

from .adapter_files import new_file
from .delta_weights import CombineError
from .stored_files import merged_header, read_files

NODES = ("stack", "average", "parallel")
"""Nodes over the files."""


def compose_files(paths: Sequence[Path], out: Path, node: str, weights: Sequence[float] | None = None) -> tuple[Path, Node]:
    """Writes all adapters of native files to one, with a node over them. `veneer.load_all` then runs them in it.

    A file with several adapters or a composition is one child. Of the heads of classifiers, only that of the last file is kept.
    Adapters are named by their files.

    Args:
        paths: the files, in the order of the children. `out`: the new file. `node`: `stack`, `average` or `parallel`.
        weights: of `average` (default: equal weights).
    Returns:
        The file and its tree.
    Raises:
        LoadError: a file is of another format or corrupt. SaveError: `out` exists.
        CombineError: two files are for different base models, or one has trained base parameters and `node` is no stack.
        OptionError: fewer than two files, weights without `average`, or a `parallel` below another node than a stack.
    """
    target = new_file(out, "native")
    files = read_files(paths)
    names, entries, states, children = _unique_names(files), [], [], []
    for number, (file, name) in enumerate(zip(files, names, strict=True)):
        renamed = dict(_rename(file, name, keep_head=number == len(files) - 1))
        for entry, state in zip(file.entries, file.states, strict=True):
            if entry["name"] in renamed:
                _check_trained(file, entry, node)
                entries.append({**entry, "name": renamed[entry["name"]]})
                states.append(state)
        children.append(_child(file, renamed))
    tree = _node(node, children, weights)
    parallel_of(tree)
    header = {**merged_header(files, node, weights), "composition": tree.to_json()}
    return write_native(target, header, entries, states), tree


def _check_trained(file: StoredFile, entry: Mapping[str, Any], node: str) -> None:
    """Raises `CombineError` for base parameters that were trained with an adapter, unless the files are a stack."""
    if entry["trained"] and node != "stack" and not is_head_method(entry["method"]):
        first = next(iter(entry["trained"]))
        message = f"{file.path}: also has trained base parameters such as {first}, which the {node} of all files would share."
        raise CombineError(message, file=file.path, where=first, given=tuple(entry["trained"]), expected=())


def _node(kind: str, children: Sequence[str | Node], weights: Sequence[float] | None) -> Node:
    if kind == "average":
        return Average(*children, weights=weights)
    if kind not in NODES or weights is not None:
        option, given = ("weights", weights) if kind in NODES else ("node", kind)
        raise OptionError.of("merge", option, given, f"none with {kind}" if kind in NODES else f"one of {', '.join(NODES)}")
    return Stack(*children) if kind == "stack" else Parallel(*children)


def _unique_names(files: Sequence[StoredFile]) -> list[str]:
    """Names of the files, of their folders if the files are all named alike, with numbers if they are not unique."""
    paths = [Path(file.path) for file in files]
    alike = len({path.stem for path in paths}) < len(paths)
    texts = [re.sub(r"[^0-9A-Za-z_-]", "_", path.parent.name if alike else path.stem) for path in paths]
    texts = [text if text[:1].isalpha() else f"adapter-{text}" for text in texts]
    return [text if texts.count(text) == 1 else f"{text}-{i}" for i, text in enumerate(texts, 1)]


def _rename(file: StoredFile, name: str, keep_head: bool) -> Iterator[tuple[str, str]]:
    """Pairs of old and new names of the attachments that are kept."""
    adapters = [entry["name"] for entry in file.entries if not is_head_method(entry["method"])]
    for entry in file.entries:
        if entry["name"] in adapters:
            yield entry["name"], name if len(adapters) == 1 else f"{name}-{entry['name']}"
        elif keep_head:
            yield entry["name"], f"{name}-{entry['name']}"


def _child(file: StoredFile, renamed: Mapping[str, str]) -> str | Node:
    """The adapters of one file: their composition, a stack, or a single name."""
    if "composition" in file.header:
        return node_from_json(file.header["composition"]).rename(renamed)
    names = [renamed[entry["name"]] for entry in file.entries if not is_head_method(entry["method"])]
    return names[0] if len(names) == 1 else Stack(*names)
