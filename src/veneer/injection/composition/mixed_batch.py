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
from .activation import Switch, named, switch
from .mixed_batch_rows import Batch, SharedPort, Strengths

Named = str | Attachment
Sample = Named | Mapping[Any, float] | Iterable[Named] | None


@contextlib.contextmanager
def mixed(model: Any, samples: Sequence[Sample], strengths: Sequence[float] | None = None) -> Iterator[None]:
    """Uses different adapters for each sample of a batch: `with mixed(pipe, ["style", None, "face"]): pipe(prompts)`.

    The output of each sample equals its output alone with its adapters, up to rounding. Each adapter runs on the rows of its
    samples only, so the cost is close to that of one adapter on all rows. In a batch of m·B rows, as guidance makes, sample i
    has the rows i, i + B, …; each of several images per prompt is one sample, in order.

    A strength multiplies the attachment's `scale`, which can be set inside the context, where `enabled` can be used as well.
    Attachments that no sample names are disabled; merged ones that are not named are part of the base. Gradients flow; with
    gradient checkpointing the backward pass must be inside, too. A compiled model is compiled again for each new combination,
    up to torch's `recompile_limit`.

    Args:
        model: the module or pipeline of the attachments.
        samples: per sample the name of an attachment, the attachment, several of them, or a mapping of names to strengths;
            None for the base model.
        strengths: per sample, multiplied with those in `samples` (default: 1).
    Raises:
        UnknownName: no attachment has this name. OptionError: no samples, or another number of strengths.
        StateError: a named attachment is merged; the context is inside another `mixed`; a batch has another size.
        UnsupportedSite: an adapter that is not the same for all samples cannot differ within a batch: weights that the host
            reads, inserted tokens, attention processors, vocabulary. It names the site.
    """
    there = {a.name: a for a in attachments(model)}
    wanted = _wanted(there, samples, strengths)
    several = {name: there[name] for name in there if any(name in sample for sample in wanted)}
    for name, attachment in several.items():
        _refuse(name, attachment)
    alike = {name: wanted[0].get(name, 0.0) for name in several if len({s.get(name, 0.0) for s in wanted}) == 1}
    switches: dict[Attachment, Switch] = {a: (a.scale, False) for a in there.values() if not a.merged}
    switches |= {a: (a.scale * alike.get(name, 1.0), True) for name, a in several.items()}
    wanted = [{name: 1.0 if name in alike else strength for name, strength in s.items()} for s in wanted]
    places = _places(several, wanted, set(alike))
    with switch(switches):
        try:
            _join(several, places)
            yield
        finally:
            _part(several, places)


def _wanted(there: Mapping[str, Attachment], samples: Sequence[Sample], strengths: Sequence[float] | None) -> list[Strengths]:
    """Per sample its attachments, by name, with their strengths."""
    if isinstance(samples, str) or not len(samples):
        message = f"mixed: samples must be a list with one entry for each sample, got {samples!r}"
        raise OptionError(message, option="samples", method="mixed", given=samples)
    times = [1.0] * len(samples) if strengths is None else [float(s) for s in strengths]
    if len(times) != len(samples):
        message = f"mixed: {len(samples)} samples and {len(times)} strengths; expected one strength per sample"
        raise OptionError(message, option="strengths", method="mixed", given=len(times), expected=len(samples))
    found: list[Strengths] = []
    for sample, factor in zip(samples, times, strict=True):
        each = sample if isinstance(sample, Mapping) else dict.fromkeys(_several(sample), 1.0)
        by_name = {_name(there, one): float(strength) * factor for one, strength in each.items()}
        found.append({name: strength for name, strength in by_name.items() if strength})
    return found


def _several(sample: Any) -> Iterable[Named]:
    return () if sample is None else (sample,) if isinstance(sample, (str, Attachment)) else sample


def _name(there: Mapping[str, Attachment], one: Named) -> str:
    name = one.name if isinstance(one, Attachment) else one
    found = named(there, name)
    if isinstance(one, Attachment) and found is not one:
        raise StateError(f"mixed: the attachment '{name}' is on another model.", where=name, given="on another model")
    return name


def _refuse(name: str, attachment: Attachment) -> None:
    if attachment.merged:
        message = f"mixed: '{name}' is merged. Call its unmerge() first, or do not name it: it is part of the base."
        raise StateError(message, where=name, given="merged")
    if attachment._installation.batches:
        raise StateError(f"mixed: '{name}' is already in another mixed batch. Exit it first.", where=name, given="mixed")
    attachment.check()


def _places(several: Mapping[str, Attachment], wanted: Sequence[Strengths], alike: set[str]) -> list[SharedPort]:
    """The ports at which samples differ, each with the seams of all attachments.

    Raises:
        UnsupportedSite: a seam that cannot differ within a batch.
    """
    batches: dict[int, Batch] = {}
    seams: dict[tuple[Any, ...], dict[str, CallSeam]] = {}
    acting = {id(seam) for attachment in several.values() for seam in attachment.seams}
    for name, attachment in several.items():
        for seam in attachment.seams:
            tower: nn.Module = seam.__dict__["tower"]
            if not isinstance(seam, CallSeam) or isinstance(seam, SwitchSeam):
                if name not in alike:
                    raise _unmixable(name, attachment, seam)
                continue
            if any(b.concerns(seam) and any(id(w) in acting for w in b.weights.values()) for b in seam.layer_orders):
                if name not in alike:  # it acts in the weights, before a later attachment
                    raise _unmixable(name, attachment, seam)
                continue
            if id(tower) not in batches:
                batches[id(tower)] = _batch(seam, several, wanted)
            seams.setdefault((id(tower), seam.read, seam.write, seam.dim, seam.inputs_before), {})[name] = seam
    return [SharedPort(batches[key[0]], _in_order(found)) for key, found in seams.items() if not found.keys() <= alike]


def _in_order(seams: Mapping[str, CallSeam]) -> dict[str, CallSeam]:
    """In the order of their hooks: that of the children of their module, reversed for seams that change the input."""
    one = next(iter(seams.values()))
    children = list(one.owner().children())
    listed = reversed(children) if one.inward else children
    return {name: seams[name] for child in listed for name in seams if seams[name] is child}


def _batch(seam: Seam, several: Mapping[str, Attachment], wanted: Sequence[Strengths]) -> Batch:
    """The batch of one tower, with the attachments that have sites in it."""
    tower, site = seam.__dict__["tower"], seam.sites[0]
    touching = {name for name, a in several.items() if any(t is tower for t in a.towers.values())}
    samples = [{name: strength for name, strength in sample.items() if name in touching} for sample in wanted]
    return Batch(site.component or type(tower).__name__, site.tower.startswith("text"), samples)


def _unmixable(name: str, attachment: Attachment, seam: Seam) -> UnsupportedSite:
    site = seam.sites[0]
    words = " Trained token embeddings change only prompts with their tokens." if isinstance(seam, VocabularySeam) else ""
    return UnsupportedSite(
        f"mixed: '{name}' ({attachment.method.name}) at {site.name} changes the whole batch ({type(seam).__name__}), so it must "
        f"be the same for every sample. Name it for all samples with one strength, or for none.{words}",
        site=site.name,
        method=attachment.method.name,
        where=name,
        given=type(seam).__name__,
        expected="CallSeam",
    )


def _join(several: Mapping[str, Attachment], places: Sequence[SharedPort]) -> None:
    for place in places:
        for name, seam in place.seams.items():
            seam.choose_path(place)
            several[name]._installation.batches[id(seam.__dict__["tower"])] = place.batch


def _part(several: Mapping[str, Attachment], places: Sequence[SharedPort]) -> None:
    for place in places:
        for seam in place.seams.values():
            seam.choose_path(None)
            adapter: Any
            for adapter in seam.adapters:
                adapter.group = 0
    for attachment in several.values():
        attachment._installation.batches.clear()
