"""Parses the conditions of an attachment, sets them for a `with` block, and passes them to its adapters in each forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..conditions import Conditions
from ..errors import ConditionError
from ..seams.adapter_calls import first_argument
from .protocol import AttachmentProtocol


@contextlib.contextmanager
def condition_scope(attachment: AttachmentProtocol, conditions: Conditions) -> Iterator[None]:
    """Sets the attachment's conditions for a `with` block and restores the previous ones after it.

    The adapters keep the conditions of the last forward pass, because gradient checkpointing recomputes it in `backward()`.
    """
    previous = attachment.conditions
    conditions.open()
    attachment.conditions = conditions
    try:
        yield
    finally:
        attachment.conditions = previous
        conditions.close()


def set_call_conditions(attachment: AttachmentProtocol, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Sets the conditions of the next forward pass on the adapters of a tower.

    Raises:
        ConditionError: the forward pass is outside a `condition` scope.
    """
    current = attachment.conditions
    if current is None:
        arguments = ", ".join(f"{name}=…" for name in attachment.method.conditions)
        raise ConditionError(
            f"'{attachment.name}' ({attachment.method.name}) needs conditions. Call the model inside "
            f"`with attachment.condition({arguments}):`, or inside `with attachment.enabled(False):` for the bare model.",
            where=attachment.name,
            given=(),
            expected=attachment.method.conditions,
        )
    sample = first_argument(args, kwargs)
    timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    conditions = current.at(len(sample), timestep, sample.device)
    adapters = [(site, a) for site, a in attachment.parts.values() if attachment.towers[site.component] is tower]
    for _, adapter in adapters:
        adapter.call.conditions = conditions
    if conditions.strength:
        attachment.method.prepare_call(adapters)


def example_conditions(attachment: AttachmentProtocol, inputs: Mapping[str, Any]) -> Conditions:
    """Example conditions for sample inputs of a tower, for the probe and the conformance suite."""
    values = attachment.method.example(list(attachment.parts.values()), inputs)
    return Conditions(attachment.name, values, {})


def parse_conditions(
    attachment: AttachmentProtocol, conditions: Mapping[str, Any], strength: float, start: float, end: float, pipeline: Any
) -> Conditions:
    """Conditions, checked and converted by the method.

    Raises:
        ConditionError: the method does not take them, one is invalid, or the pipeline passed to `attach` was garbage-collected.
    """
    method, name = attachment.method, attachment.name
    if pipeline is None and attachment.pipeline is not None:
        pipeline = attachment.pipeline()
        if pipeline is None:
            raise ConditionError(
                f"'{name}': the pipeline passed to attach was garbage-collected. Pass it again: condition(…, pipeline=PIPE).",
                where=name,
                expected="pipeline",
            )
    unknown = sorted(set(conditions) - set(method.conditions))
    if unknown or not method.conditions:
        expected = ", ".join(method.conditions) or "no conditions"
        message = f"'{name}' ({method.name}) takes {expected}; got {', '.join(conditions) or 'none'}."
        raise ConditionError(message, where=name, given=tuple(conditions), expected=method.conditions)
    sites = [site for site, _ in attachment.parts.values()]
    values, options = method.parse_conditions(sites, pipeline, **conditions)
    return Conditions(name, values, options, strength, start, end, pipeline)
