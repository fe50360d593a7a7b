"""Mixed batches: different adapters and strengths for each sample of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..attachment.attach import attachments
from ..attachment.attachment import Attachment
from ..errors import OptionError, StateError, UnsupportedSite
from ..seams.call_seam import CallSeam, SwitchSeam
from ..seams.seam import Seam
from ..seams.sequence_seams import VocabularySeam
from .activation import Switch, find_attachment, set_switches
from .mixed_batch_rows import Batch, SharedPort, Strengths

AttachmentOrName = str | Attachment
Sample = AttachmentOrName | Mapping[Any, float] | Iterable[AttachmentOrName] | None


@contextlib.contextmanager
def mixed(model: Any, samples: Sequence[Sample], strengths: Sequence[float] | None = None) -> Iterator[None]:
    """Uses different adapters for each sample of a batch: `with mixed(pipe, ["style", None, "face"]): pipe(prompts)`.

    The output of each sample equals its output alone with its adapters, up to rounding. Each adapter runs on the rows of its
    samples only, so the cost is close to that of one adapter on all rows. In a batch of m·B rows, as guidance makes, sample i
    has the rows i, i + B, …. With several images per prompt, each image is one sample, in order.

    A strength multiplies the attachment's `scale`. Inside the context, `scale` can be set and `enabled` can be used. Attachments
    that no sample names are disabled; merged ones are part of the base model. The output is differentiable; with gradient
    checkpointing, `backward()` must be called inside the context. A compiled model is compiled again for each new combination, up
    to torch's `recompile_limit`.

    Args:
        model: the module or pipeline of the attachments.
        samples: per sample an attachment or its name, several of them, or a mapping of them to strengths; None for the base
            model.
        strengths: one factor per sample for the strengths in `samples` (default: 1).
    Raises:
        UnknownName: no attachment has this name. OptionError: no samples, or another number of strengths.
        StateError: a named attachment is merged or in a composition; the context is inside another `mixed`; a batch has another
            size.
        UnsupportedSite: an adapter differs between samples at a site that must be the same for the batch: weights that the host
            reads, inserted tokens, attention processors, vocabulary.
    """
    attached = {a.name: a for a in attachments(model)}
    by_sample = _strengths_by_sample(attached, samples, strengths)
    used = {name: attached[name] for name in attached if any(name in sample for sample in by_sample)}
    for name, attachment in used.items():
        _check_state(name, attachment)
    uniform = {name: by_sample[0].get(name, 0.0) for name in used if len({s.get(name, 0.0) for s in by_sample}) == 1}
    switches: dict[Attachment, Switch] = {a: (a.scale, False) for a in attached.values() if not a.merged}
    switches |= {a: (a.scale * uniform.get(name, 1.0), True) for name, a in used.items()}
    by_sample = [{name: 1.0 if name in uniform else strength for name, strength in s.items()} for s in by_sample]
    ports = _shared_ports(used, by_sample, set(uniform))
    with set_switches(switches):
        try:
            _start_routing(used, ports)
            yield
        finally:
            _stop_routing(used, ports)


def _strengths_by_sample(
    attached: Mapping[str, Attachment], samples: Sequence[Sample], strengths: Sequence[float] | None
) -> list[Strengths]:
    """Per sample the names of its attachments and their strengths."""
    if isinstance(samples, str) or not len(samples):
        message = f"mixed: samples must be a list with one entry for each sample, got {samples!r}"
        raise OptionError(message, option="samples", method="mixed", given=samples)
    factors = [1.0] * len(samples) if strengths is None else [float(s) for s in strengths]
    if len(factors) != len(samples):
        message = f"mixed: {len(samples)} samples and {len(factors)} strengths; expected one strength per sample"
        raise OptionError(message, option="strengths", method="mixed", given=len(factors), expected=len(samples))
    by_sample: list[Strengths] = []
    for sample, factor in zip(samples, factors, strict=True):
        mapping = sample if isinstance(sample, Mapping) else dict.fromkeys(_as_iterable(sample), 1.0)
        by_name = {_resolve_name(attached, key): float(strength) * factor for key, strength in mapping.items()}
        by_sample.append({name: strength for name, strength in by_name.items() if strength})
    return by_sample


def _as_iterable(sample: Any) -> Iterable[AttachmentOrName]:
    return () if sample is None else (sample,) if isinstance(sample, (str, Attachment)) else sample


def _resolve_name(attached: Mapping[str, Attachment], key: AttachmentOrName) -> str:
    name = key.name if isinstance(key, Attachment) else key
    attachment = find_attachment(attached, name)
    if isinstance(key, Attachment) and attachment is not key:
        raise StateError(f"mixed: the attachment '{name}' is on another model.", where=name, given="on another model")
    return name


def _check_state(name: str, attachment: Attachment) -> None:
    """Raises `StateError` if an attachment is merged or in another mixed batch."""
    if attachment.merged:
        message = f"mixed: '{name}' is merged. Call its unmerge() first, or do not name it: it is part of the base model."
        raise StateError(message, where=name, given="merged")
    if attachment._installation.batches:
        raise StateError(f"mixed: '{name}' is already in another mixed batch. Exit it first.", where=name, given="mixed")
    attachment._installation.refuse_composed("mixed")
    attachment.check()


def _shared_ports(used: Mapping[str, Attachment], by_sample: Sequence[Strengths], uniform: set[str]) -> list[SharedPort]:
    """The ports at which samples differ, each with the seams of all attachments there.

    Args:
        uniform: names of the attachments with the same strength for all samples.
    Raises:
        UnsupportedSite: a seam cannot differ within a batch.
    """
    batches: dict[int, Batch] = {}
    seams: dict[tuple[Any, ...], dict[str, CallSeam]] = {}
    used_seams = {id(seam) for attachment in used.values() for seam in attachment.seams}
    for name, attachment in used.items():
        for seam in attachment.seams:
            tower: nn.Module = seam.__dict__["tower"]
            if not isinstance(seam, CallSeam) or isinstance(seam, SwitchSeam):
                if name not in uniform:
                    raise _not_mixable(name, attachment, seam)
                continue
            if any(
                order.may_apply(seam) and any(id(w) in used_seams for w in order.weights.values()) for order in seam.layer_orders
            ):
                if name not in uniform:  # it is applied in the weights, before a later attachment
                    raise _not_mixable(name, attachment, seam)
                continue
            if id(tower) not in batches:
                batches[id(tower)] = _batch(seam, used, by_sample)
            seams.setdefault((id(tower), seam.read, seam.write, seam.dim, seam.inputs_before), {})[name] = seam
    return [SharedPort(batches[key[0]], sort_by_hooks(group)) for key, group in seams.items() if not group.keys() <= uniform]


def sort_by_hooks(seams: Mapping[str, CallSeam]) -> dict[str, CallSeam]:
    """Seams in the order of their hooks: that of the children of their module, reversed for seams that change the input."""
    first = next(iter(seams.values()))
    children = list(first.owner().children())
    in_order = reversed(children) if first.changes_input else children
    return {name: seams[name] for child in in_order for name in seams if seams[name] is child}


def _batch(seam: Seam, used: Mapping[str, Attachment], by_sample: Sequence[Strengths]) -> Batch:
    """The batch of one tower, with the attachments that have sites in it."""
    tower, site = seam.__dict__["tower"], seam.sites[0]
    on_tower = {name for name, a in used.items() if any(t is tower for t in a.towers.values())}
    samples = [{name: strength for name, strength in sample.items() if name in on_tower} for sample in by_sample]
    return Batch(site.component or type(tower).__name__, site.tower.startswith("text"), samples)


def _not_mixable(name: str, attachment: Attachment, seam: Seam) -> UnsupportedSite:
    site = seam.sites[0]
    hint = " Trained token embeddings change only prompts with their tokens." if isinstance(seam, VocabularySeam) else ""
    return UnsupportedSite(
        f"mixed: '{name}' ({attachment.method.name}) at {site.name} changes the whole batch ({type(seam).__name__}), so it must "
        f"be the same for every sample. Name it for all samples with the same strength, or for none.{hint}",
        site=site.name,
        method=attachment.method.name,
        where=name,
        given=type(seam).__name__,
        expected="CallSeam",
    )


def _start_routing(used: Mapping[str, Attachment], ports: Sequence[SharedPort]) -> None:
    for port in ports:
        for name, seam in port.seams.items():
            seam.choose_path(port)
            used[name]._installation.batches[id(seam.__dict__["tower"])] = port.batch


def _stop_routing(used: Mapping[str, Attachment], ports: Sequence[SharedPort]) -> None:
    for port in ports:
        for seam in port.seams.values():
            seam.choose_path(None)
            adapter: Any
            for adapter in seam.adapters:
                adapter.group = 0
    for attachment in used.values():
        attachment._installation.batches.clear()
