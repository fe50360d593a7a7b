"""Mixed batches: every sample with adapters and strengths of its own."""

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
from .batch_routing import Batch, Place, Strengths

Named = str | Attachment
Sample = Named | Mapping[Any, float] | Iterable[Named] | None


@contextlib.contextmanager
def mixed(model: Any, samples: Sequence[Sample], strengths: Sequence[float] | None = None) -> Iterator[None]:
    """In its context each sample of a batch has its own adapters: `with mixed(pipe, ["style", None, "face"]): pipe(prompts)`.

    Each sample comes out as it does alone with its own adapters, up to the rounding of products of other sizes; and as each
    adapter runs on its own rows only, the whole takes little more than one adapter on all. A batch of m·B rows, as
    guidance makes, has sample i in the rows i, i + B, …; pictures of one prompt are samples of their own, one after the other.

    A strength multiplies the attachment's own `scale`, which may be set inside, as `enabled` may be used. Those that no sample
    names are off, those merged and not named are part of the base. Gradients flow; with gradient checkpointing the backward
    pass must be inside, too. A compiled model is compiled once more for each other mixture, up to torch's `recompile_limit`.

    Args:
        model: the module or pipeline that they are attached to.
        samples: of each sample the name of an attachment, the attachment, several of them, or names with strengths; None for
            the base.
        strengths: of each sample, multiplied with the others; 1 by default.
    Raises:
        UnknownName: a name that is not attached. ValueError: other numbers of samples and strengths, or none.
        StateError: a named one is merged; inside another `mixed`; a batch of another size, when it comes.
        UnsupportedSite: an adapter that cannot differ within a batch is not the same for all samples: weights that the host
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
    """Of each sample the attachments that act on it, with their strengths."""
    if isinstance(samples, str) or not len(samples):
        message = f"mixed: samples must be a list with one entry for each sample, got {samples!r}"
        raise OptionError(message, option="samples", method="mixed", given=samples)
    times = [1.0] * len(samples) if strengths is None else [float(s) for s in strengths]
    if len(times) != len(samples):
        message = f"mixed: {len(samples)} samples and {len(times)} strengths; give as many"
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
        message = f"mixed: '{name}' is merged. Call its unmerge() first, or leave it out: it is part of the base."
        raise StateError(message, where=name, given="merged")
    if attachment._installation.batches:
        raise StateError(f"mixed: '{name}' is in another mixed batch already. Leave that one first.", where=name, given="mixed")
    attachment.check()


def _places(several: Mapping[str, Attachment], wanted: Sequence[Strengths], alike: set[str]) -> list[Place]:
    """Where samples differ: the seams of all attachments, place by place.

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
                if name not in alike:  # it acts in weights, beneath those of another one
                    raise _unmixable(name, attachment, seam)
                continue
            if id(tower) not in batches:
                batches[id(tower)] = _batch(seam, several, wanted)
            seams.setdefault((id(tower), seam.read, seam.write, seam.dim, seam.inputs_before), {})[name] = seam
    return [Place(batches[key[0]], _in_order(found)) for key, found in seams.items() if not found.keys() <= alike]


def _in_order(seams: Mapping[str, CallSeam]) -> dict[str, CallSeam]:
    """As their hooks run, which is as their module lists them; for changes of x the other way round."""
    one = next(iter(seams.values()))
    children = list(one.owner().children())
    listed = reversed(children) if one.inward else children
    return {name: seams[name] for child in listed for name in seams if seams[name] is child}


def _batch(seam: Seam, several: Mapping[str, Attachment], wanted: Sequence[Strengths]) -> Batch:
    """A tower's batch, with the attachments that touch the tower."""
    tower, site = seam.__dict__["tower"], seam.sites[0]
    touching = {name for name, a in several.items() if any(t is tower for t in a.towers.values())}
    samples = [{name: strength for name, strength in sample.items() if name in touching} for sample in wanted]
    return Batch(site.component or type(tower).__name__, site.tower.startswith("text"), samples)


def _unmixable(name: str, attachment: Attachment, seam: Seam) -> UnsupportedSite:
    site = seam.sites[0]
    words = " Trained token embeddings change only prompts with their tokens." if isinstance(seam, VocabularySeam) else ""
    return UnsupportedSite(
        f"mixed: '{name}' ({attachment.method.name}) at {site.name} acts on the whole batch ({type(seam).__name__}), so it must "
        f"be the same for every sample. Name it for all with one strength, or for none.{words}",
        site=site.name,
        method=attachment.method.name,
        where=name,
        given=type(seam).__name__,
        expected="CallSeam",
    )


def _join(several: Mapping[str, Attachment], places: Sequence[Place]) -> None:
    for place in places:
        for name, seam in place.seams.items():
            seam.choose_path(place)
            several[name]._installation.batches[id(seam.__dict__["tower"])] = place.batch


def _part(several: Mapping[str, Attachment], places: Sequence[Place]) -> None:
    for place in places:
        for seam in place.seams.values():
            seam.choose_path(None)
            adapter: Any
            for adapter in seam.adapters:
                adapter.group = 0
    for attachment in several.values():
        attachment._installation.batches.clear()
