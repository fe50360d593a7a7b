"""Attaches a method to a model, and lists the attachments of a model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SelectionError, StateError
from ..method import Method
from ..registry import methods
from ..towers import clear_tower_cache, towers_of
from .attachment import Attachment
from .model_state import find_model_state, refuse_compiled
from .plan import plan
from .quantized_sites import reject_trained, reject_weight_forms


def attach(
    model: Any,
    method: str | Method,
    *,
    where: str | Sequence[str] | None = None,
    name: str | None = None,
    train: str | Sequence[str] = (),
    sample: Any = None,
    **config: Any,
) -> Attachment:
    """Attaches a method's adapters to a model or a whole pipeline. All or nothing: after an error the model is unchanged.

    Args:
        model: a module that a host matches, or a pipeline (anything with `components`).
        method: a name, with `config` as its options, or a config instance.
        where: selection in the words of `veneer.sites(model)`; None for the method's own default.
        name: of the attachment; default is the method's name, numbered if taken.
        train: base parameters to train as well, as a selection (`("head",)`). They are saved with the adapters.
        sample: True or sample inputs: end with a probe for dead sites.
    Returns:
        The attachment. The base is frozen; the adapters' parameters and those in `train` require gradients.
    Raises:
        UnknownName: no method has this name.
        SelectionError: `where` or `train` matches nothing.
        UnsupportedSite: the method cannot adapt a selected site, or needs a new weight where it is quantized.
        HostChanged: the model is compiled or sharded; attach first.
        DeadSite: with `sample`, parameters do not reach the output. BlockedGradient: a layer stops gradients.
    """
    if isinstance(method, str):
        method = methods.get(method).from_config(config)
    elif config:
        raise TypeError(f"attach: options {sorted(config)} next to a config instance; put them into {type(method).__name__}(…).")
    towers = towers_of(model)
    clear_tower_cache()
    for tower in towers:
        refuse_compiled(tower.module, "attach", tower.wrapped)
    planned = plan(towers, method, where, train)
    reject_weight_forms(planned)
    reject_trained(planned)
    attachment = Attachment(planned, _free_name(towers, name, method.name))
    attachment.pipeline = weakref.ref(model) if hasattr(model, "scheduler") else None
    try:
        attachment._installation.install()
        if sample is not None and sample is not False:
            attachment.probe(None if sample is True else sample)
    except BaseException:
        attachment._installation.uninstall()
        raise
    return attachment


def _free_name(towers: Sequence[Any], name: str | None, default: str) -> str:
    states = [tower_state for t in towers if (tower_state := find_model_state(t.module)) is not None]
    taken = {a.name for tower_state in states for a in tower_state.attachments}
    if name is not None:
        if name in taken:
            raise StateError(f"'{name}' is attached already. Detach it or choose another name.", where=name, given="attached")
        if not name.replace("-", "_").isidentifier():
            raise SelectionError(f"name='{name}': use letters, digits, '_' and '-'.")
        return name
    numbers = (default if i == 1 else f"{default}_{i}" for i in range(1, len(taken) + 2))
    return next(n for n in numbers if n not in taken)


def attachments(model: Any) -> list[Attachment]:
    """Attachments of a model or pipeline, in the order of attaching."""
    found: dict[Attachment, None] = {}
    for tower in towers_of(model, strict=False):
        tower_state = find_model_state(tower.module)
        found |= dict.fromkeys(a for a in (tower_state.attachments if tower_state else ()) if isinstance(a, Attachment))
    return [*found]


@dataclass(frozen=True)
class Merge:
    """An attachment that is merged into the weights, and the strength that it was merged at."""

    attachment: Attachment
    scale: float

    @property
    def name(self) -> str:
        """The attachment's name."""
        return self.attachment.name


def merges(model: Any) -> list[Merge]:
    """Attachments that are merged into the weights of a model or pipeline, in the order of merging, each with `name` and `scale`.

    The last one must be unmerged first. If the towers of a pipeline hold different ones, those of its main tower come first.
    """
    found: dict[Attachment, Merge] = {}
    for tower in towers_of(model, strict=False):
        tower_state = find_model_state(tower.module)
        for attachment, scale in tower_state.merged if tower_state else ():
            if isinstance(attachment, Attachment):
                found.setdefault(attachment, Merge(attachment, scale))
    return [*found.values()]
