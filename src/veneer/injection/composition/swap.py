"""Other values into an attachment that stays where it is: no hook, shape or number of the model changes, nor any graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter_forms import SwappableAdapter
from ..attachment.protocol import AttachmentProtocol
from ..attachment.state_dict import LoadReport, compare, fill, unfit
from ..errors import LoadError, OptionError, StateError
from ..method import Adapter, Method
from ..sites import Site


def swap_state(attachment: AttachmentProtocol, method: Method, sites: Sequence[str], state: Mapping[str, Tensor]) -> LoadReport:
    """Fill an attachment so that it makes the change that `method` with `state` would make at `sites`. All or nothing.

    If the adapters implement `state_to_match(other)`, the other may be smaller (a lower rank, another scale), and sites that it
    lacks are set to no change; else its options and sites must be the same.

    Args:
        method: of what comes in. `sites`: names of its sites. `state`: its tensors, as `load_state_dict` takes them.
    Raises:
        StateError: the attachment is merged or detached. LoadError: what comes in does not fit; nothing has been changed then.
    """
    refuse_merged(attachment)
    if type(method) is not type(attachment.method):
        message = f"'{attachment.name}' is {attachment.method.name} and this is {method.name}. Attach it beside."
        raise LoadError(message, where=attachment.name, given=method.name, expected=attachment.method.name)
    away = [name for name in sites if name not in attachment.parts]
    if away:
        raise LoadError(
            f"it changes {len(away)} sites that '{attachment.name}' is not attached to: {', '.join(away[:8])}. Attach with a "
            "where= that has them, or load it beside.",
            where=attachment.name,
            option="where",
            given=tuple(away),
        )
    if all(isinstance(adapter, SwappableAdapter) for _, adapter in attachment.parts.values()):
        state = _taken(attachment, method, set(sites), state)
    else:
        _require_alike(attachment, method, sites)
    report = compare(attachment, state)
    if not report.clean:
        message = f"'{attachment.name}' ({attachment.method.name}): {report}. It goes in whole or not at all."
        raise unfit(message, attachment, state, report)
    fill(attachment, state, report)
    return report


def refuse_merged(attachment: AttachmentProtocol) -> None:
    """Raise `StateError` if the values of an attachment are in the weights, or nowhere."""
    if attachment.merged:
        message = f"'{attachment.name}' is merged. Call unmerge() before another file goes in."
        raise StateError(message, where=attachment.name, given="merged")
    attachment.check()


def _require_alike(attachment: AttachmentProtocol, method: Method, sites: Sequence[str]) -> None:
    """Raise if the options or the sites differ."""
    here, there = attachment.method.config(), method.config()
    differ = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if differ:
        told = ", ".join(f"{key} {there.get(key)!r}, not {here.get(key)!r}" for key in differ)
        message = f"{method.name} needs a file with the same options; this one has {told}. Attach with these options."
        given, expected = ({key: config.get(key) for key in differ} for config in (there, here))
        raise LoadError(message, where=attachment.name, option=differ[0], given=given, expected=expected)
    lacks = [name for name in attachment.parts if name not in set(sites)]
    if lacks:
        raise LoadError(
            f"it has nothing for {len(lacks)} sites of '{attachment.name}': {', '.join(lacks[:8])}. Attach with its own where=.",
            where=attachment.name,
            option="where",
            missing=lacks,
        )


def _taken(attachment: AttachmentProtocol, method: Method, sites: set[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for every adapter, and those of `state` that belong to no adapter."""
    own: dict[str, dict[str, Tensor]] = {name: {} for name in sites}
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, _, param = key.rpartition(":")
        (own[name] if name in sites else found)[param if name in sites else key] = tensor
    for name, (site, adapter) in attachment.parts.items():
        arena: Any = adapter
        try:
            with torch.no_grad():
                taken = arena.state_to_match(_built(method, site, own[name], adapter) if name in sites else None)
        except ValueError as error:
            raise LoadError.from_error(error, f"{name}: {error}.", where=name) from error
        found.update({f"{name}:{param}": tensor for param, tensor in taken.items()})
    return found


def _built(method: Method, site: Site, state: Mapping[str, Tensor], arena: Adapter) -> Adapter:
    """The adapter of what comes in, on the CPU, in the arena's dtype, with its tensors in it. No random numbers are drawn."""
    with torch.device("meta"):
        other = method.at(site).build(site)
    wanted = other.state_dict()
    wrong = [key for key, tensor in wanted.items() if key not in state or state[key].shape != tensor.shape]
    if wrong or len(state) != len(wanted):
        shown = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in state.items())
        message = f"it has {shown or 'nothing'}; expected {', '.join(f'{k} {tuple(t.shape)}' for k, t in wanted.items())}"
        given, expected = ({key: tuple(tensor.shape) for key, tensor in each.items()} for each in (state, wanted))
        raise OptionError(message, given=given, expected=expected)
    dtype = next(arena.parameters()).dtype
    other.load_state_dict({key: tensor.to("cpu", dtype) for key, tensor in state.items()}, assign=True)
    return other
