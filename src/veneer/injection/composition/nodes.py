"""Nodes of a composition of adapters: a tree of `Stack`, `Average` and `Parallel` over the names of attachments."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError, StateError

Leaf = Callable[[str, Tensor, Tensor], Tensor]  # (name, x, y) -> y'
DEPTH = 8
"""Most levels of a tree that is read from a file."""


class Node(ABC):
    """A node over at least two children, each the name of an attachment or another node.

    Attributes:
        children: in the order given. `kind`: its name in files.
    """

    kind: ClassVar[str]
    children: tuple[str | Node, ...]

    def __init__(self, *children: str | Node) -> None:
        if len(children) < 2 or not all(isinstance(child, (str, Node)) for child in children):
            raise OptionError.of(self.kind, "children", children, "at least two names of attachments or nodes")
        self.children = children
        names = self.names
        if len(set(names)) < len(names):
            raise OptionError.of(self.kind, "children", names, "names that are all different")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the attachments in the tree, from left to right."""
        return tuple(name for child in self.children for name in ((child,) if isinstance(child, str) else child.names))

    def nodes(self) -> Iterator[Node]:
        """This node and all nodes below it."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.nodes()

    def run(self, leaf: Leaf, x: Tensor, y: Tensor, backward: bool = False) -> Tensor:
        """y' at one port of the host.

        Args:
            leaf: applies the adapter with a name, (name, x, y) to y'. `x`, `y`: what the adapters read, and what they change.
            backward: adapters attached later act first, as on the input of a layer.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Options besides the children, as JSON values."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """The tree as JSON values: `{"average": ["a", {"stack": ["b", "c"]}], "weights": [0.5, 0.5]}`."""
        return {self.kind: [c if isinstance(c, str) else c.to_json() for c in self.children], **self.options()}

    def rename(self, names: Mapping[str, str]) -> Node:
        """The same tree with other names of the attachments."""
        children = [names.get(c, c) if isinstance(c, str) else c.rename(names) for c in self.children]
        return type(self)(*children, **self.options())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.kind, self.names))

    def __repr__(self) -> str:
        parts = [repr(child) for child in self.children] + [f"{k}={v!r}" for k, v in self.options().items()]
        return f"{type(self).__name__}({', '.join(parts)})"


def run_child(child: str | Node, leaf: Leaf, x: Tensor, y: Tensor, backward: bool) -> Tensor:
    """y' of an attachment or a node."""
    return leaf(child, x, y) if isinstance(child, str) else child.run(leaf, x, y, backward)


class Stack(Node):
    """Each child changes the output of the one before it: `Stack("domain", "task")`. Several attachments are one by default.

    Args:
        children: in the order of attaching.
    """

    kind: ClassVar[str] = "stack"

    def run(self, leaf: Leaf, x: Tensor, y: Tensor, backward: bool = False) -> Tensor:
        for child in reversed(self.children) if backward else self.children:
            y = run_child(child, leaf, x, y, backward)
        return y


class Average(Node):
    """y' = y + Σ_n w_n (y_n − y): each child changes the same y to y_n. A child without an adapter at a layer leaves y there.

    Args:
        children: in any order.
        weights: w_n, finite, also negative (default: 1 / number of children).
    """

    kind: ClassVar[str] = "average"
    weights: tuple[float, ...]

    def __init__(self, *children: str | Node, weights: Sequence[float] | None = None) -> None:
        super().__init__(*children)
        self.weights = (1 / len(children),) * len(children) if weights is None else tuple(weights)
        numbers = all(isinstance(w, (int, float)) and math.isfinite(w) for w in self.weights)
        if len(self.weights) != len(children) or not numbers:
            raise OptionError.of(self.kind, "weights", self.weights, f"{len(children)} finite numbers, one for each child")

    def options(self) -> dict[str, Any]:
        return {"weights": list(self.weights)}

    def run(self, leaf: Leaf, x: Tensor, y: Tensor, backward: bool = False) -> Tensor:
        changes = [w * (run_child(c, leaf, x, y, backward) - y) for c, w in zip(self.children, self.weights, strict=True) if w]
        return sum(changes, y)


class Parallel(Node):
    """The batch is repeated once for each child, which changes its own copy: B images give rows 0 to B − 1 of the first child, …

    Args:
        children: in the order of their rows.
        shared_layers: run the layers before the first block with one of these adapters once, and repeat the batch there; for
            models whose blocks read the stream alone, such as vision transformers.
    """

    kind: ClassVar[str] = "parallel"
    shared_layers: bool

    def __init__(self, *children: str | Node, shared_layers: bool = False) -> None:
        super().__init__(*children)
        self.shared_layers = shared_layers

    def options(self) -> dict[str, Any]:
        return {"shared_layers": self.shared_layers}

    def run(self, leaf: Leaf, x: Tensor, y: Tensor, backward: bool = False) -> Tensor:
        count = len(self.children)
        if len(x) % count or len(y) % count:
            given = (len(x), len(y))
            message = f"parallel: a layer has a batch of {given}, which is no multiple of the {count} adapters. Call the model."
            raise StateError(message, where=", ".join(self.names), given=given, expected=count)
        rows = zip(self.children, x.chunk(count), y.chunk(count), strict=True)
        return torch.cat([run_child(child, leaf, a, b, backward) for child, a, b in rows])


KINDS: dict[str, type[Node]] = {node.kind: node for node in (Stack, Average, Parallel)}


def node_from_json(value: Any, depth: int = DEPTH) -> Node:
    """Inverse of `Node.to_json`.

    Raises:
        OptionError: it is no tree of nodes, or one with more than `DEPTH` levels.
    """
    kind = next((kind for kind in KINDS if isinstance(value, dict) and kind in value), None)
    if kind is None or not isinstance(value[kind], list) or not depth:
        raise OptionError.of("composition", "node", str(value)[:80], f"one of {', '.join(KINDS)} with a list of children")
    children = [child if isinstance(child, str) else node_from_json(child, depth - 1) for child in value[kind]]
    options = {key: option for key, option in value.items() if key != kind}
    try:
        return KINDS[kind](*children, **options)
    except TypeError as error:
        raise OptionError.of("composition", "node", str(options)[:80], f"the options of {kind}") from error
