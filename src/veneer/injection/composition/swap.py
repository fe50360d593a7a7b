"""Loads the state of another adapter into an attachment, without a change of hooks, shapes or compiled graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter_forms import SwappableAdapter
from ..attachment.protocol import AttachmentProtocol
from ..attachment.state_dict import LoadReport, check_tensors, compare, fill, load_error
from ..errors import LoadError, OptionError, StateError
from ..method import Adapter, Method
from ..sites import Site


def swap_state(attachment: AttachmentProtocol, method: Method, sites: Sequence[str], state: Mapping[str, Tensor]) -> LoadReport:
    """Loads a state so that the attachment computes what `method` with `state` computes at `sites`. All or nothing.

    If the adapters implement `state_from(other)`, the other adapters may be smaller (a lower rank, another scale), and sites
    that they lack are set to no change. Otherwise options and sites must be the same.

    Args:
        method: config of the other adapters. `sites`: names of their sites. `state`: their tensors, as for `load_state_dict`.
    Raises:
        StateError: the attachment is merged or detached. LoadError: the state is not compatible; nothing is changed then.
    """
    refuse_merged(attachment)
    if type(method) is not type(attachment.method):
        message = f"'{attachment.name}' is {attachment.method.name}, the file has {method.name}. Load it as another attachment."
        raise LoadError(message, where=attachment.name, given=method.name, expected=attachment.method.name)
    unknown = [name for name in sites if name not in attachment.parts]
    if unknown:
        raise LoadError(
            f"the file adapts {len(unknown)} sites that '{attachment.name}' does not have: {', '.join(unknown[:8])}. Attach with "
            "where= that selects them, or load the file as another attachment.",
            where=attachment.name,
            option="where",
            given=tuple(unknown),
        )
    if all(isinstance(adapter, SwappableAdapter) for _, adapter in attachment.parts.values()):
        state = _matched_state(attachment, method, set(sites), state)
    else:
        _require_same_config(attachment, method, sites)
    report = compare(attachment, state)
    if not report.clean:
        message = f"'{attachment.name}' ({attachment.method.name}): {report}. Nothing was loaded."
        raise load_error(message, attachment, state, report)
    check_tensors(attachment, state)
    fill(attachment, state, report)
    return report


def refuse_merged(attachment: AttachmentProtocol) -> None:
    """Raises `StateError` if an attachment is merged or detached."""
    if attachment.merged:
        message = f"'{attachment.name}' is merged. Call unmerge() before swap()."
        raise StateError(message, where=attachment.name, given="merged")
    attachment.check()


def _require_same_config(attachment: AttachmentProtocol, method: Method, sites: Sequence[str]) -> None:
    """Raises `LoadError` if options or sites differ."""
    own, other = attachment.method.config(), method.config()
    keys = [key for key in {**own, **other} if own.get(key) != other.get(key)]
    if keys:
        differences = ", ".join(f"{key} {other.get(key)!r}, not {own.get(key)!r}" for key in keys)
        message = f"{method.name} needs a file with the same options; this one has {differences}. Attach with these options."
        given, expected = ({key: config.get(key) for key in keys} for config in (other, own))
        raise LoadError(message, where=attachment.name, option=keys[0], given=given, expected=expected)
    missing = [name for name in attachment.parts if name not in set(sites)]
    if missing:
        raise LoadError(
            f"the file has no tensors for {len(missing)} sites of '{attachment.name}': {', '.join(missing[:8])}. Attach with the "
            "where= of the file.",
            where=attachment.name,
            option="where",
            missing=missing,
        )


def _matched_state(
    attachment: AttachmentProtocol, method: Method, sites: set[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state with which each adapter computes the same as its counterpart, and the tensors that belong to no adapter."""
    by_site: dict[str, dict[str, Tensor]] = {name: {} for name in sites}
    matched: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, _, param = key.rpartition(":")
        (by_site[name] if name in sites else matched)[param if name in sites else key] = tensor
    for name, (site, adapter) in attachment.parts.items():
        target: Any = adapter
        try:
            with torch.no_grad():
                other = _build_adapter(method, site, by_site[name], adapter) if name in sites else None
                tensors = target.state_from(other)
        except ValueError as error:
            raise LoadError.from_error(error, f"{name}: {error}.", where=name) from error
        matched.update({f"{name}:{param}": tensor for param, tensor in tensors.items()})
    return matched


def _build_adapter(method: Method, site: Site, state: Mapping[str, Tensor], target: Adapter) -> Adapter:
    """The adapter of the file, on the CPU, in the dtype of the target. Uses no random numbers."""
    with torch.device("meta"):
        adapter = method.at(site).build(site)
    expected_state = adapter.state_dict()
    wrong = [key for key, tensor in expected_state.items() if key not in state or state[key].shape != tensor.shape]
    if wrong or len(state) != len(expected_state):
        given, expected = ({key: tuple(tensor.shape) for key, tensor in d.items()} for d in (state, expected_state))
        shapes = [", ".join(f"{key} {shape}" for key, shape in d.items()) for d in (given, expected)]
        message = f"the file has {shapes[0] or 'no tensors'}; expected {shapes[1]}"
        raise OptionError(message, given=given, expected=expected)
    dtype = next(target.parameters()).dtype
    adapter.load_state_dict({key: tensor.to("cpu", dtype) for key, tensor in state.items()}, assign=True)
    return adapter
