"""`attach()`, and what is attached."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from ..errors import SelectionError, StateError
from ..method import Method
from ..registry import methods
from ..towers import forget, towers_of
from .attachment import Attachment
from .model_state import Merge, peek, refuse_compiled
from .plan import plan


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
    """Put a method's adapters on a model or a whole pipeline. All or nothing: a failure leaves no trace.

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
        UnknownName, SelectionError, UnsupportedSite, HostChanged, DeadSite.
    """
    if isinstance(method, str):
        method = methods.get(method).from_config(config)
    elif config:
        raise TypeError(f"attach: options {sorted(config)} next to a config instance; put them into {type(method).__name__}(…).")
    towers = towers_of(model)
    forget()
    for tower in towers:
        refuse_compiled(tower.module, "attach", tower.wrapped)
    attachment = Attachment(plan(towers, method, where, train), _free_name(towers, name, method.name))
    attachment.pipeline = weakref.ref(model) if hasattr(model, "scheduler") else None
    try:
        attachment._joined.join()
        if sample is not None and sample is not False:
            attachment.probe(None if sample is True else sample)
    except BaseException:
        attachment._joined.leave()
        raise
    return attachment


def _free_name(towers: Sequence[Any], name: str | None, default: str) -> str:
    ledgers = [ledger for t in towers if (ledger := peek(t.module)) is not None]
    taken = {a.name for ledger in ledgers for a in ledger.attachments}
    if name is not None:
        if name in taken:
            raise StateError(f"'{name}' is attached already. Detach it or choose another name.", where=name, given="attached")
        if not name.replace("-", "_").isidentifier():
            raise SelectionError(f"name='{name}': use letters, digits, '_' and '-'.")
        return name
    numbers = (default if i == 1 else f"{default}_{i}" for i in range(1, len(taken) + 2))
    return next(n for n in numbers if n not in taken)


def attachments(model: Any) -> list[Attachment]:
    """What is attached to a model or pipeline, in order."""
    found: list[Attachment] = []
    for tower in towers_of(model, strict=False):
        ledger = peek(tower.module)
        found.extend(a for a in (ledger.attachments if ledger else ()) if a not in found)
    return found


def merges(model: Any) -> list[Merge]:
    """What is merged into the weights of a model or pipeline, the first merged first: `attachment`, `name` and `scale` of each.

    The last one must be unmerged first. Where the towers of a pipeline hold different ones, those of its main tower come first.
    """
    found: list[Merge] = []
    for tower in towers_of(model, strict=False):
        ledger = peek(tower.module)
        known = [m.attachment for m in found]
        found.extend(m for m in (ledger.merged if ledger else ()) if m.attachment not in known)
    return found
