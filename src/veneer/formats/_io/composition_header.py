"""The tree of nodes that a native file's attachments run in: written to its header, and restored when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.injection import Attachment, LoadError, SaveError, VeneerError
from veneer.injection.composition.compose import compose, compositions_of
from veneer.injection.composition.nodes import Node, Stack, node_from_json
from veneer.injection.errors import UnknownName

from .reader import File

KEY = "composition"


def composition_entry(attachments: Sequence[Attachment], target: Path) -> dict[str, Any]:
    """Header entry of the compositions that the attachments are in, several as a stack; empty without one.

    Raises:
        SaveError: several attachments of a composition, and not all of them; or two compositions that are no stack.
    """
    nodes: list[Node] = []
    for composition in compositions_of(attachments) if len(attachments) > 1 else ():
        missing = [name for name in composition.node.names if all(a.name != name for a in attachments)]
        if missing and composition.is_routed:
            given = tuple(a.name for a in attachments)
            message = (
                f"{target}: {composition.node!r} also has {', '.join(missing)}. Save all of its attachments, or a single one."
            )
            raise SaveError(message, file=target, where=missing[0], given=given, expected=tuple(missing))
        nodes += [] if missing else [composition.node]
    return {KEY: _stack(nodes, attachments, target).to_json()} if nodes else {}


def _stack(nodes: Sequence[Node], attachments: Sequence[Attachment], target: Path) -> Node:
    """One tree of several, each of which acts on the output of the one before it."""
    if len(nodes) == 1:
        return nodes[0]
    stack = Stack(*(child for node in nodes for child in (node.children if isinstance(node, Stack) else (node,))))
    names = [a.name for a in attachments]
    if list(stack.names) != sorted(stack.names, key=names.index):
        message = f"{target}: the compositions {', '.join(map(repr, nodes))} overlap in the order of attaching. Save each alone."
        raise SaveError(message, file=target, where=KEY, given=stack.names, expected=tuple(sorted(stack.names, key=names.index)))
    return stack


def read_composition(file: File, header: Mapping[str, Any]) -> Node | None:
    """The tree in a header, or None.

    Raises:
        LoadError: it is no tree, or names an attachment that the file does not have.
    """
    if KEY not in header:
        return None
    try:
        node = node_from_json(header[KEY])
        names = [entry["name"] for entry in header["attachments"]]
        for name in node.names:
            if name not in names:
                raise UnknownName(
                    f"no attachment '{name[:80]}' in the file", name, "attachment", given=name, expected=tuple(names)
                )
    except VeneerError as error:
        message = f"{file.path}: its composition is invalid: {error}. The file is corrupt."
        raise LoadError.from_error(error, message, file=file.path, where=KEY) from error
    return node


def restore_composition(model: Any, file: File, header: Mapping[str, Any], loaded: list[Attachment]) -> list[Attachment]:
    """Composes loaded attachments as the header says, and returns them; detaches them after an error.

    Raises:
        LoadError: the model cannot run them in this composition.
    """
    try:
        node = read_composition(file, header)
        if node is not None and loaded:
            entries = header["attachments"]
            if len(loaded) < len(entries):  # the heads were left out
                entries = [entry for entry in entries if any(entry["method"] == a.method.name for a in loaded)]
            names = {entry["name"]: a.name for entry, a in zip(entries, loaded, strict=True)}
            compose(model, node.rename(names))
    except VeneerError as error:
        for attachment in reversed(loaded):
            attachment.detach()
        raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path) from error
    return loaded
