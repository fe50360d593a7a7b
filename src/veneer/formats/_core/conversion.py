"""From one format to another, by way of a model: the same change of every weight, or nothing is written."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, SaveError
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import ParamSite, WeightSite

from .._io.reader import File, read
from .format import Format, Options, formats, known_format
from .token_embeddings import attach_tokens, token_embeddings, token_files

TOLERANCE = 1e-5  # of the largest change in a weight: what float32 loses when factors are put together otherwise
ROUNDING = 2**-23  # of the largest weight: what float32 loses where a file stores W's own size, as DoRA's magnitudes do
WORDS = "textual_inversion"
HOLDING = ("native", "embeddings", "onetrainer")  # formats that can hold token embeddings


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: files, weights compared, the largest difference over the largest change, what was left out."""

    files: tuple[Path, ...]
    weights: int
    difference: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        told = f"{self.weights} weights change as before (largest difference {self.difference:.1e} of the change)"
        return "\n".join([*map(str, self.files), told, *self.notes])


def convert(
    model: Any, path: str | PathLike[str], to: str, out: str | PathLike[str], provenance: Mapping[str, Any] | None = None
) -> Converted:
    """Write the adapters of a file in another format, load what was written, and compare what both do to each weight.

    Token embeddings, which LoRA formats cannot hold, go into files beside it, one for each token, named by the token: A1111,
    Forge and ComfyUI take the file name as the trigger.

    Args:
        model: the pipeline or model that the file is for; it is as before afterwards.
        to: a format's name. `out`: the new file, or folder. `provenance`: to be written with it.
    Raises:
        LoadError: the file does not fit the model.
        SaveError: the format cannot hold it, the change would be another one, or `out` is there already.
    """
    file, target = read(path), formats.get(to)()
    known = known_format(file)
    final = target.place(out)
    attached = known.load(model, file, Options())
    try:
        tokens = [] if to in HOLDING else _take_tokens(model, attached)
        jobs = {final: (target, [a for a in attached if a not in tokens])}
        _refuse_existing([final, *(final.with_name(name) for name in target.beside)])
        places = token_files(final, [each for a in tokens for each in token_embeddings(a)]).values()
        jobs |= {place: (formats.get("embeddings")(), [a]) for place, a in zip(places, tokens, strict=True)}
        _narrow(attached, file)
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=final.parent) as folder:
            made = {
                place: f.save(some, Path(folder) / f"{i}" / place.name, provenance)
                for i, (place, (f, some)) in enumerate(jobs.items())
                if some
            }
            for attachment in reversed(attached):
                attachment.detach()
            before, attached = attached, []
            for place, (form, some) in jobs.items():
                if some:
                    attached += form.load(model, read(made[place]), Options(same_base=False))
            weights, difference = compare(before, attached, final)
            for place, temporary in made.items():
                place.parent.mkdir(exist_ok=True)
                os.replace(temporary.parent if jobs[place][0].folder else temporary, place)
            also = [final.with_name(name) for name in target.beside if (Path(folder) / "0" / name).exists()]
            for place in also:
                os.replace(Path(folder) / "0" / place.name, place)
    finally:
        for attachment in reversed(attached):
            attachment.detach()
    return Converted((*made, *also), weights, difference, tuple(_notes(file, known, to, list(places))))


def compare(before: Sequence[Attachment], after: Sequence[Attachment], target: Path) -> tuple[int, float]:
    """How many adapted weights were compared by W' − W on the base's own W, and the largest difference over the largest change.

    Each weight by itself must be the same within `TOLERANCE` of its own change. What has no weight form must be the same tensors.

    Raises:
        SaveError: they differ.
    """
    was, now = _weights(before), _weights(after)
    largest = worst = 0.0
    for place in dict.fromkeys([*was, *now]):
        parts = was.get(place) or now[place]
        weight = _base(*parts)
        old, new = (_changed(weight, some.get(place, ())) for some in (was, now))
        size, apart = float((old - weight).abs().max()), float((old - new).abs().max())
        if apart > TOLERANCE * size + ROUNDING * float(weight.abs().max()):
            name = parts[0].site.name
            message = f"{target}: '{name}' would change by {apart:.3g} more or less, of {size:.3g}. Nothing was written."
            raise SaveError(message, file=target, where=name, given=apart, expected=size)
        largest, worst = max(largest, size), max(worst, apart)
    old_rest, new_rest = _rest(before), _rest(after)
    for key in dict.fromkeys([*old_rest, *new_rest]):
        if key not in old_rest or key not in new_rest or not torch.equal(old_rest[key].float(), new_rest[key].float()):
            raise SaveError(f"{target}: '{key}' would not be the same. Nothing was written.", file=target, where=key)
    return sum(map(len, was.values())), worst / largest if largest else 0.0


def _take_tokens(model: Any, attached: list[Attachment]) -> list[Attachment]:
    """The attachments of tokens in `attached`; one that has several is replaced there by one for each."""
    found = []
    for attachment in [a for a in attached if a.method.name == WORDS]:
        singles = [attachment]
        if len(embeddings := token_embeddings(attachment)) > 1:
            index = attached.index(attachment)
            attached.pop(index).detach()
            singles = attach_tokens(model, embeddings)
            attached[index:index] = singles
        found += singles
    return found


class _Part(NamedTuple):
    """An adapter with a weight form: where, and in which model."""

    site: WeightSite | ParamSite
    adapter: Any
    tower: nn.Module


def _weights(attachments: Sequence[Attachment]) -> dict[tuple[str, str, str], list[_Part]]:
    """The adapters of each tensor, in the order in which they act."""
    found: dict[tuple[str, str, str], list[_Part]] = {}
    for attachment in attachments:
        for site, adapter in attachment.parts.values():
            if isinstance(site, (WeightSite, ParamSite)) and hasattr(adapter, "weight"):
                part = _Part(site, adapter, attachment.towers[site.component])
                found.setdefault((site.component, site.path, site.param), []).append(part)
    return found


def _rest(attachments: Sequence[Attachment]) -> dict[str, Tensor]:
    """Everything else that was trained, by name."""
    compared = {part.site.name for parts in _weights(attachments).values() for part in parts}
    tokens = [each for a in attachments if a.method.name == WORDS for each in token_embeddings(a)]
    found = {f"{each.token} at {name}": rows for each in tokens for name, rows in each.rows.items()}
    others = [a for a in attachments if a.method.name != WORDS]
    return found | {k: t for a in others for k, t in a.state_dict().items() if k.rpartition(":")[0] not in compared}


def _base(first: _Part, *others: _Part) -> Tensor:
    """The base's own tensor in double precision; where it is quantised or not there, one of its shape to compare on."""
    site = first.site
    tensor = base_tensor(first.tower, site.path, site.param)
    if tensor.is_floating_point() and not tensor.is_meta:
        return tensor.detach().double().cpu()
    shape = site.weight_shape if isinstance(site, WeightSite) else site.shape
    rows = max(part.site.rows[1] if part.site.rows else shape[0] for part in (first, *others))
    return torch.randn(rows, *shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _changed(weight: Tensor, parts: Sequence[_Part]) -> Tensor:
    """W with the weight form of each adapter in its rows, in double precision."""
    after = weight.clone()
    for site, adapter, _ in parts:
        apart = {id(value): value for value in vars(adapter).values() if isinstance(value, nn.Module)}  # what it only knows
        rows = after[slice(*site.rows)] if site.rows else after
        rows.copy_(copy.deepcopy(adapter, apart).double().cpu().weight(rows))
    return after


def _narrow(attachments: Sequence[Attachment], file: File) -> None:
    """A file in half precision becomes one in half precision, where that loses nothing. What is the base's own stays as it is."""
    kinds = {t.dtype for t in file.tensors(finite=False).values() if t.is_floating_point() and t.ndim}
    if len(kinds) == 1 and (kind := next(iter(kinds))).itemsize == 2:
        for parameter in (p for a in attachments for _, adapter in a.parts.values() for p in adapter.parameters()):
            if torch.equal(parameter.to(kind).to(parameter.dtype), parameter):
                parameter.data = parameter.data.to(kind)


def _refuse_existing(places: Sequence[Path]) -> None:
    for place in places:
        if place.exists():
            raise SaveError(f"{place}: it is there already. Give another --out.", file=place, given="exists")


def _notes(file: File, known: Format, to: str, tokens: Sequence[Path]) -> list[str]:
    """What the new file does not have."""
    notes = [f"token embedding in {path.name}: its trigger in A1111 and ComfyUI is {path.stem}" for path in tokens]
    if known.name != to and file.metadata:
        keys = [key for key in file.metadata if key != "format"]
        shown = ", ".join(keys[:4]) + (" …" if len(keys) > 4 else "")
        notes += [f"not carried: {len(keys)} entries of the header ({shown})"] if keys else []
    return notes
