"""Reading and writing an attachment's tensors: adapters, trained base parameters, norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter_forms import CheckedAdapter
from ..errors import LoadError
from ..seams.adapter_calls import base_tensor
from ..sharded_tensor import copy_whole, full_tensor, is_sharded
from ..sites import NormSite, ParamSite, WeightSite
from .model_state import changed_statistics, find_model_state, lookup
from .protocol import AttachmentProtocol


@dataclass(frozen=True)
class LoadReport:
    """What `load_state_dict` did with each tensor, and remarks of a file's reader, such as where a scale came from."""

    used: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    misshapen: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """True if nothing is missing, unused or misshapen."""
        return not (self.missing or self.unused or self.misshapen)

    def __str__(self) -> str:
        def listed(names: tuple[str, ...]) -> str:
            return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

        lines = [f"used {len(self.used)} tensors"]
        for word in ("missing", "unused", "misshapen"):
            names = getattr(self, word)
            if names:
                lines.append(f"{word} {len(names)}: {listed(names)}")
        return "; ".join([*lines, *self.notes])


def state_of(attachment: AttachmentProtocol) -> dict[str, Tensor]:
    """Everything that training changed, under `site-name:parameter`."""
    state = {f"{n}:{k}": full_tensor(t.detach()) for n, (_, a) in attachment.parts.items() for k, t in a.state_dict().items()}
    state.update({key: full_tensor(p.detach()) for key, p in attachment.trained.items()})
    for component, tower in attachment.towers.items():
        state.update({_name(component, key): buffer for key, buffer in changed_statistics(tower).items()})
    return state


def load_state(attachment: AttachmentProtocol, state: Mapping[str, Tensor], strict: bool, assign: bool = False) -> LoadReport:
    """Copy tensors in, or assign them to parameters, or raise before anything is changed."""
    targets = dict(_targets(attachment, state))
    report = _compared(targets, state)
    if strict and not report.clean:
        told = f"'{attachment.name}' ({attachment.method.name}): {report}. Pass strict=False to load what fits."
        raise load_error(told, attachment, state, report)
    check_tensors(attachment, {key: state[key] for key in report.used})
    assigned = _assign(attachment, state, report) if assign else set()
    _copy(attachment, targets, state, [key for key in report.used if key not in assigned])
    return report


def check_tensors(attachment: AttachmentProtocol, state: Mapping[str, Tensor]) -> None:
    """Checks that tensors of an adapter that depend on each other are consistent.

    Raises:
        LoadError: they are not.
    """
    for name, adapter in _checked(attachment).items():
        own = {key.removeprefix(f"{name}:"): tensor for key, tensor in state.items() if key.startswith(f"{name}:")}
        try:
            adapter.check_state(own)
        except ValueError as error:
            message = f"'{attachment.name}' ({attachment.method.name}): {name}: {error}"
            raise LoadError.from_error(error, message, where=name) from error


def _checked(attachment: AttachmentProtocol) -> dict[str, CheckedAdapter]:
    return {name: adapter for name, (_, adapter) in attachment.parts.items() if isinstance(adapter, CheckedAdapter)}


def load_error(message: str, attachment: AttachmentProtocol, state: Mapping[str, Tensor], report: LoadReport) -> LoadError:
    """The error that `state` does not fit, with what is missing, unused and misshapen."""
    wrong = {k: _differ(state[k], t) for k, t in _targets(attachment, state) if k in state and not _fits(state[k], t)}
    return LoadError(message, where=attachment.name, missing=report.missing, unused=report.unused, misshapen=wrong)


def compare(attachment: AttachmentProtocol, state: Mapping[str, Tensor]) -> LoadReport:
    """What of `state` fits."""
    return _compared(dict(_targets(attachment, state)), state)


def _compared(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LoadReport:
    used = [k for k, t in targets.items() if k in state and _fits(state[k], t)]
    return LoadReport(
        tuple(used),
        tuple(k for k in targets if k not in state),
        tuple(k for k in state if k not in targets),
        tuple(
            "{} {} for {}".format(k, *_differ(state[k], t)) for k, t in targets.items() if k in state and not _fits(state[k], t)
        ),
    )


def _fits(given: Tensor, target: Tensor) -> bool:
    """Of one shape, and both whole numbers or neither."""
    return given.shape == target.shape and given.is_floating_point() == target.is_floating_point()


def _differ(given: Tensor, target: Tensor) -> tuple[Any, Any]:
    """The shapes of both, or their dtypes where the shapes are equal."""
    if given.shape == target.shape:
        return given.dtype, target.dtype
    return tuple(given.shape), tuple(target.shape)


def fill(attachment: AttachmentProtocol, state: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy in what fits."""
    _copy(attachment, dict(_targets(attachment, state)), state, report.used)


def _copy(
    attachment: AttachmentProtocol, targets: Mapping[str, Tensor], state: Mapping[str, Tensor], keys: Iterable[str]
) -> None:
    loaded = set[str]()
    with torch.no_grad():
        for key in keys:
            copy_whole(targets[key], state[key])
            loaded.add(key.rpartition(":")[0])
    for name, adapter in _checked(attachment).items():
        if name in loaded:
            adapter.after_load()


def _assign(attachment: AttachmentProtocol, state: Mapping[str, Tensor], report: LoadReport) -> set[str]:
    """Assigns tensors to the adapters' parameters on the same device; returns their keys."""
    used, assigned = {*report.used}, set[str]()
    for name, (_, adapter) in attachment.parts.items():
        for end, parameter in adapter.named_parameters(remove_duplicate=False):
            key = f"{name}:{end}"
            if key in used and parameter.device == state[key].device and not is_sharded(parameter):
                parameter.data = state[key].detach()
                assigned.add(key)
    return assigned


def replaced_tensors(attachment: AttachmentProtocol) -> Iterator[tuple[str, str]]:
    """(component, path) of the tensors whose every row has its whole value in an adapter."""
    held: dict[tuple[str, str], list[Any]] = {}
    for site, adapter in attachment.parts.values():
        if adapter.replaces and isinstance(site, (WeightSite, ParamSite, NormSite)):
            held.setdefault((site.component, f"{site.path}.{site.param}".lstrip(".")), []).append(site.rows)
    for (component, path), rows in held.items():
        owner, _, param = path.rpartition(".")
        tensor = base_tensor(attachment.towers[component], owner, param)
        if None in rows or sum(stop - start for start, stop in rows) == len(tensor):
            yield component, path


def _targets(attachment: AttachmentProtocol, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, (_, adapter) in attachment.parts.items():
        yield from ((f"{name}:{key}", tensor) for key, tensor in adapter.state_dict().items())
    yield from attachment.trained.items()
    for component, tower in attachment.towers.items():
        tower_state = find_model_state(tower)
        for key in tower_state.statistics if tower_state else ():
            if _name(component, key) in state:
                yield _name(component, key), lookup(tower, key)


def _name(component: str, key: str) -> str:
    owner, _, param = key.rpartition(".")
    return f"{component}.{owner}:{param}" if component else f"{owner}:{param}"
