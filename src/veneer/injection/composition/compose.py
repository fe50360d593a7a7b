"""`compose`: runs the attachments of a model as a tree of nodes, `Stack`, `Average` and `Parallel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from ..attachment.attach import attachments
from ..attachment.attachment import Attachment
from ..errors import OptionError, StateError, UnsupportedSite
from ..seams.call_seam import CallSeam, SwitchSeam
from .activation import find_attachment
from .mixed_batch import sort_by_hooks
from .nodes import Average, Node, Parallel, Stack
from .repeated_batch import RepeatedBatch

Port = tuple[Any, ...]


class NodePort:
    """The call seams below a node at one port of the host. The first one, `leader`, applies the adapters of all.

    Args:
        node: with the names of the seams. `seams`: attachment to seam, in the order of their hooks.
    """

    def __init__(self, node: Node, seams: Mapping[str, CallSeam]) -> None:
        self.node, self.seams = node, dict(seams)
        self.leader = next(iter(self.seams.values()))
        self.one_port = self.leader.read == self.leader.write  # then each adapter reads the output of the previous one

    def run(self, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y' of the tree. y itself is never modified in place, because several adapters read it."""
        return self.node.run(self._apply, x, y, self.leader.changes_input)

    def _apply(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        seam = self.seams.get(name)
        return y if seam is None or seam.is_disabled() else seam.apply_slices(y if self.one_port else x, y)

    def share(self, seam: CallSeam) -> float:
        """1: nodes have no strengths for single rows."""
        return 1.0


class Composition:
    """Result of `compose`: a context manager that ends the composition. `undo()` does so as well.

    Attributes:
        node: the tree. `attachments`: by name.
    """

    def __init__(self, node: Node, attached: Mapping[str, Attachment], ports: Sequence[NodePort], batch: Any) -> None:
        self.node, self.attachments = node, dict(attached)
        self._ports, self._batch = list(ports), batch

    @property
    def is_routed(self) -> bool:
        """True if a node other than `Stack` runs the adapters."""
        return bool(self._ports)

    def start(self) -> None:
        """Routes the seams through the nodes."""
        for port in self._ports:
            for seam in port.seams.values():
                seam.choose_path(port)
        for attachment in self.attachments.values():
            attachment._installation.composition = self
        if self._batch is not None:
            self._batch.start()

    def undo(self) -> None:
        """Ends the composition: the attachments act one after the other. A second call does nothing."""
        ports, self._ports = self._ports, []
        for port in ports:
            for seam in port.seams.values():
                seam.choose_path(None)
        for attachment in self.attachments.values():
            attachment._installation.composition = None
        if self._batch is not None:
            self._batch.stop()

    def __enter__(self) -> Composition:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def compose(model: Any, node: Node) -> Composition:
    """Runs attachments as a tree: `compose(model, Average("a", "b"))`. Saving them all together saves the tree. All or nothing.

    Attachments that the tree does not name act as before, in the order of attaching. Detaching one that it names ends the
    composition.

    Args:
        model: the module or pipeline of the attachments.
        node: the tree, such as `Stack("domain", Average("a", "b"))`; at most one `Parallel`, at its root or in a `Stack` there.
    Returns:
        The composition; as a context manager, it ends the composition at the end of the block.
    Raises:
        UnknownName: no attachment has one of the names. StateError: one is merged, in a mixed batch or in a composition.
        OptionError: children of a `Stack` are not in the order of attaching; a `Parallel` below another node, or on a pipeline.
        UnsupportedSite: adapters below an `Average` or a `Parallel` change what is the same for the whole batch, such as a weight
            that the host reads or inserted tokens; or two that are to change the same tensor read different ones.
    """
    attached = {a.name: a for a in attachments(model)}
    used = {name: find_attachment(attached, name) for name in node.names}
    for name, attachment in used.items():
        _check_state(name, attachment)
    _check_order(node, [*attached])
    parallel = parallel_of(node)
    if parallel is not None and hasattr(model, "components"):
        message = (
            "compose: Parallel repeats the batch, which a pipeline does not expect. Compose one of its models, or use mixed."
        )
        raise OptionError(message, option="node", method="compose", given="parallel", expected="a bare model")
    ports = [port for part in _routed_nodes(node) for port in _ports(part, used)]
    batch = None if parallel is None else RepeatedBatch(parallel, [used[name] for name in parallel.names])
    composition = Composition(node, used, ports, batch)
    composition.start()
    return composition


def composition_of(attached: Sequence[Attachment]) -> Composition | None:
    """The first composition that attachments are in, or None."""
    return next(iter(compositions_of(attached)), None)


def compositions_of(attached: Sequence[Attachment]) -> list[Composition]:
    """The compositions that attachments are in, each once."""
    several = [c for a in attached if (c := a._installation.composition) is not None]
    return list({id(composition): composition for composition in several}.values())


def _check_state(name: str, attachment: Attachment) -> None:
    installation = attachment._installation
    state = "merged" if attachment.merged else "mixed" if installation.batches else "composed" if installation.composition else ""
    if state:
        remedy = {"merged": "Call its unmerge() first.", "mixed": "Leave the context of `mixed` first."}
        message = f"compose: '{name}' is {state}. {remedy.get(state, 'Call undo() of its composition first.')}"
        raise StateError(message, where=name, given=state)
    attachment.check()


def _check_order(node: Node, order: Sequence[str]) -> None:
    """Raises `OptionError` if the children of a `Stack` are not in the order of attaching."""
    for stack in node.nodes():
        names = [name for name in stack.names if isinstance(stack, Stack)]
        if names != sorted(names, key=order.index):
            expected = tuple(sorted(names, key=order.index))
            message = f"stack: {', '.join(names)}; expected the order of attaching, which is {', '.join(expected)}."
            raise OptionError(message, option="children", method="stack", given=tuple(names), expected=expected)


def parallel_of(node: Node) -> Parallel | None:
    """The `Parallel` of a tree, or None.

    Raises:
        OptionError: there are several, or it is below another node than a `Stack` at the root.
    """
    allowed = [node, *(node.children if isinstance(node, Stack) else ())]
    inside = [each for each in node.nodes() if isinstance(each, Parallel)]
    if len(inside) > 1 or any(not any(each is top for top in allowed) for each in inside):
        message = f"compose: {node!r} has a Parallel below another node; expected one, at the root or in a Stack at the root."
        raise OptionError(message, option="node", method="compose", given=repr(node), expected="one Parallel")
    return inside[0] if inside else None


def _routed_nodes(node: Node) -> Iterator[Node]:
    """The largest parts of a tree that are no stacks: stacks of them are the order of the hooks."""
    if not isinstance(node, Stack):
        yield node
        return
    for child in node.children:
        if isinstance(child, Node):
            yield from _routed_nodes(child)


def _ports(node: Node, used: Mapping[str, Attachment]) -> list[NodePort]:
    """The ports at which adapters below a node act."""
    groups: dict[Port, dict[str, CallSeam]] = {}
    for name in node.names:
        _reject_extras(node, used[name])
        for seam in used[name].seams:
            if not isinstance(seam, CallSeam) or isinstance(seam, SwitchSeam) or is_in_weights(seam):
                raise _unsupported(node, used[name], seam, "one batch row each")
            key = (id(seam.__dict__["tower"]), seam.read, seam.write, seam.dim, seam.inputs_before)
            groups.setdefault(key, {})[name] = seam
    _check_inputs(node, groups, used)
    return [NodePort(node, sort_by_hooks(group)) for group in groups.values()]


def _reject_extras(node: Node, attachment: Attachment) -> None:
    """Raises `UnsupportedSite` for an attachment with trained base parameters, which the whole batch and all children share."""
    if attachment.extras:
        first = next(iter(attachment.extras))
        message = (
            f"{node.kind}: '{attachment.name}' ({attachment.method.name}) also trains base parameters such as {first}, which all "
            "children share. Stack these adapters."
        )
        details = {"site": first, "method": attachment.method.name, "where": attachment.name}
        raise UnsupportedSite(message, **details, given=tuple(attachment.extras), expected=())


def is_in_weights(seam: CallSeam) -> bool:
    """True if a later attachment may apply the adapters of a seam in the weights, where no node runs."""
    return any(order.may_apply(seam) for order in seam.layer_orders)


def _check_inputs(node: Node, groups: Mapping[Port, Mapping[str, CallSeam]], used: Mapping[str, Attachment]) -> None:
    """Raises `UnsupportedSite` if a stack or an average has adapters that change one tensor and read different ones."""
    for each in node.nodes():
        if not isinstance(each, (Stack, Average)):
            continue
        first: dict[Port, tuple[Port, str]] = {}
        for key, seams in groups.items():
            for name in each.names:
                other, _ = first.setdefault((key[0], key[2]), (key, name)) if name in seams else (key, name)
                if other != key:
                    raise _unsupported(each, used[name], seams[name], str(other[1]))


def _unsupported(node: Node, attachment: Attachment, seam: Any, expected: str) -> UnsupportedSite:
    site = seam.sites[0]
    given = str(seam.read) if isinstance(seam, CallSeam) else type(seam).__name__
    return UnsupportedSite(
        f"{node.kind}: '{attachment.name}' ({attachment.method.name}) at {site.name} acts through {given}; expected {expected}. "
        "Stack these adapters, or merge them.",
        site=site.name,
        method=attachment.method.name,
        where=attachment.name,
        given=given,
        expected=expected,
    )
