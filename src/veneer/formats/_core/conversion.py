"""Converts an adapter file to another format through a model; writes nothing unless every ΔW is preserved."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.functional.low_rank import product_norm
from veneer.injection import Attachment, SaveError
from veneer.injection.adapter_forms import LowRankAdapter, WeightAdapter
from veneer.injection.composition.merge import widened
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import ParamSite, WeightSite

from .._io.reader import File, read
from .format import Format, Options, formats, known_format
from .token_embeddings import attach_tokens, token_embeddings, token_files

TOLERANCE = 1e-5  # relative to the largest element of ΔW: float32 error of factors multiplied in another order
ROUNDING = 2**-23  # relative to the largest element of W: float32 error of stored norms of W, such as DoRA's magnitudes
TEXTUAL_INVERSION = "textual_inversion"
TOKEN_FORMATS = ("native", "embeddings", "onetrainer")  # formats that can hold token embeddings


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion: files, weights compared, largest difference relative to the largest ΔW, and notes on omissions."""

    files: tuple[Path, ...]
    weights: int
    difference: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        summary = f"{self.weights} weight updates are equal (largest difference {self.difference:.1e} of ΔW)"
        return "\n".join([*map(str, self.files), summary, *self.notes])


def convert(
    model: Any, path: str | PathLike[str], to: str, out: str | PathLike[str], provenance: Mapping[str, Any] | None = None
) -> ConversionResult:
    """Converts a file to another format, loads the result, and compares the two weight updates at every weight.

    Token embeddings, which LoRA formats cannot hold, are written to separate files, one per token and named after it: A1111,
    Forge and ComfyUI use the file name as the trigger.

    Args:
        model: the pipeline or model that the file is for; unchanged afterwards.
        to: name of the target format. `out`: the new file or folder. `provenance`: stored in it.
    Raises:
        LoadError: the file is incompatible with the model.
        SaveError: the format cannot hold the adapter, a weight update would differ, or `out` exists.
    """
    file, target = read(path), formats.get(to)()
    known = known_format(file)
    final = target.place(out)
    attached = known.load(model, file, Options())
    try:
        tokens = [] if to in TOKEN_FORMATS else _split_tokens(model, attached)
        jobs = {final: (target, [a for a in attached if a not in tokens])}
        _reject_existing([final, *(final.with_name(name) for name in target.beside)])
        places = token_files(final, [each for a in tokens for each in token_embeddings(a)]).values()
        jobs |= {place: (formats.get("embeddings")(), [a]) for place, a in zip(places, tokens, strict=True)}
        _restore_precision(attached, file)
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=final.parent) as folder:
            temporary_files = {
                place: file_format.save(group, Path(folder) / f"{i}" / place.name, provenance)
                for i, (place, (file_format, group)) in enumerate(jobs.items())
                if group
            }
            for attachment in reversed(attached):
                attachment.detach()
            before, attached = attached, []
            for place, (file_format, group) in jobs.items():
                if group:
                    attached += file_format.load(model, read(temporary_files[place]), Options(same_base=False))
            weights, difference = compare(before, attached, final)
            for place, temporary_file in temporary_files.items():
                place.parent.mkdir(exist_ok=True)
                os.replace(temporary_file.parent if jobs[place][0].folder else temporary_file, place)
            extra_files = [final.with_name(name) for name in target.beside if (Path(folder) / "0" / name).exists()]
            for place in extra_files:
                os.replace(Path(folder) / "0" / place.name, place)
    finally:
        for attachment in reversed(attached):
            attachment.detach()
    return ConversionResult((*temporary_files, *extra_files), weights, difference, tuple(_notes(file, known, to, list(places))))


def compare(before: Sequence[Attachment], after: Sequence[Attachment], target: Path) -> tuple[int, float]:
    """Compares ΔW = W' − W: number of adapted weights, and the largest difference relative to the largest ΔW (Frobenius norms).

    Each weight must agree within `TOLERANCE` of its ΔW. Adapters without a weight form must have identical tensors. Of low-rank
    adapters the factors are compared, without a matrix of the weight's size; of others ΔW at the base's W.

    Raises:
        SaveError: they differ.
    """
    was, now = _weight_adapters(before), _weight_adapters(after)
    largest = worst = 0.0
    for place in dict.fromkeys([*was, *now]):
        old, new = was.get(place, []), now.get(place, [])
        size, apart, allowed = _compare_weight(old, new)
        if not apart <= allowed:  # NaN is a difference, too
            name = (*old, *new)[0].site.name
            message = f"{target}: ΔW of '{name}' would differ by {apart:.3g}; its norm is {size:.3g}. Nothing was written."
            raise SaveError(message, file=target, where=name, given=apart, expected=size)
        largest, worst = max(largest, size), max(worst, apart)
    old_rest, new_rest = _other_tensors(before), _other_tensors(after)
    for key in dict.fromkeys([*old_rest, *new_rest]):
        if key not in old_rest or key not in new_rest or not torch.equal(old_rest[key].float(), new_rest[key].float()):
            raise SaveError(f"{target}: the tensor '{key}' would differ. Nothing was written.", file=target, where=key)
    return sum(map(len, was.values())), worst / largest if largest else 0.0


def _split_tokens(model: Any, attached: list[Attachment]) -> list[Attachment]:
    """The textual-inversion attachments in `attached`, after splitting there those that hold several tokens."""
    attachments = []
    for attachment in [a for a in attached if a.method.name == TEXTUAL_INVERSION]:
        singles = [attachment]
        if len(embeddings := token_embeddings(attachment)) > 1:
            index = attached.index(attachment)
            attached.pop(index).detach()
            singles = attach_tokens(model, embeddings)
            attached[index:index] = singles
        attachments += singles
    return attachments


class _AdaptedWeight(NamedTuple):
    """An adapter with a weight form, its site and its model."""

    site: WeightSite | ParamSite
    adapter: Any
    tower: nn.Module


def _weight_adapters(attachments: Sequence[Attachment]) -> dict[tuple[str, str, str], list[_AdaptedWeight]]:
    """The adapters of each tensor, in the order in which they apply."""
    parts: dict[tuple[str, str, str], list[_AdaptedWeight]] = {}
    for attachment in attachments:
        for site, adapter in attachment.parts.values():
            if isinstance(site, (WeightSite, ParamSite)) and isinstance(adapter, WeightAdapter):
                part = _AdaptedWeight(site, adapter, attachment.towers[site.component])
                parts.setdefault((site.component, site.path, site.param), []).append(part)
    return parts


def _other_tensors(attachments: Sequence[Attachment]) -> dict[str, Tensor]:
    """All other trained tensors, by name."""
    compared = {part.site.name for parts in _weight_adapters(attachments).values() for part in parts}
    tokens = [each for a in attachments if a.method.name == TEXTUAL_INVERSION for each in token_embeddings(a)]
    rows_of_tokens = {f"{each.token} at {name}": rows for each in tokens for name, rows in each.rows.items()}
    others = [a for a in attachments if a.method.name != TEXTUAL_INVERSION]
    return rows_of_tokens | {k: t for a in others for k, t in a.state_dict().items() if k.rpartition(":")[0] not in compared}


def _compare_weight(old: Sequence[_AdaptedWeight], new: Sequence[_AdaptedWeight]) -> tuple[float, float, float]:
    """Norm of the old ΔW, of its difference to the new one, and the largest difference that rounding explains."""
    rows, width = _base_shape(*old, *new)[0], math.prod(_base_shape(*old, *new)[1:])
    factors, others = _sum_of_factors(old, rows, width), _sum_of_factors(new, rows, width)
    if factors is not None and others is not None:
        (left, right), (other_left, other_right) = factors, others
        size = product_norm(left, right)
        if torch.equal(right, other_right):
            apart = product_norm(left - other_left, right)
        else:
            apart = product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right]))
        return size, apart, TOLERANCE * size
    weight = _base_weight(*old, *new)
    before, after = _apply(weight, old), _apply(weight, new)
    size, apart = float((before - weight).norm()), float((before - after).norm())
    return size, apart, TOLERANCE * size + ROUNDING * float(weight.norm())


@torch.no_grad()
def _sum_of_factors(parts: Sequence[_AdaptedWeight], rows: int, width: int) -> tuple[Tensor, Tensor] | None:
    """C (rows, rank) and D (rank, width) in double precision with ΔW = C D of all parts; None if one has no factors."""
    left, right = [torch.zeros(rows, 0, dtype=torch.float64)], [torch.zeros(0, width, dtype=torch.float64)]
    for site, adapter, _ in parts:
        if not isinstance(adapter, LowRankAdapter) or (isinstance(site, WeightSite) and site.groups > 1):
            return None
        module: Any = adapter
        with widened(module, torch.float64):
            own_left, own_right = (t[0].cpu() for t in adapter.factors())
        padded = torch.zeros(rows, own_left.shape[1], dtype=torch.float64)
        padded[slice(*site.rows) if site.rows else slice(None)] = own_left
        left.append(padded)
        right.append(own_right.clone())
    return torch.cat(left, 1), torch.cat(right)


def _base_shape(first: _AdaptedWeight, *others: _AdaptedWeight) -> tuple[int, ...]:
    """Shape of the base tensor, as far as the adapters reach."""
    site = first.site
    shape = site.weight_shape if isinstance(site, WeightSite) else site.shape
    return max(part.site.rows[1] if part.site.rows else shape[0] for part in (first, *others)), *shape[1:]


def _base_weight(*parts: _AdaptedWeight) -> Tensor:
    """The base tensor in double precision; a random tensor of the same shape if it is quantized or on the meta device."""
    site = parts[0].site
    tensor = base_tensor(parts[0].tower, site.path, site.param)
    if tensor.is_floating_point() and not tensor.is_meta:
        return tensor.detach().double().cpu()
    return torch.randn(_base_shape(*parts), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _apply(weight: Tensor, parts: Sequence[_AdaptedWeight]) -> Tensor:
    """W after the weight form of each adapter on its rows, in double precision."""
    after = weight.clone()
    for site, adapter, _ in parts:
        shared = {id(value): value for value in vars(adapter).values() if isinstance(value, nn.Module)}  # references, not copied
        rows = after[slice(*site.rows)] if site.rows else after
        rows.copy_(copy.deepcopy(adapter, shared).double().cpu().weight(rows))
    return after


def _restore_precision(attachments: Sequence[Attachment], file: File) -> None:
    """Keeps half precision: casts adapter parameters to the file's dtype where this is lossless. Base parameters are not cast."""
    kinds = {t.dtype for t in file.tensors(finite=False).values() if t.is_floating_point() and t.ndim}
    if len(kinds) == 1 and (kind := next(iter(kinds))).itemsize == 2:
        for parameter in (p for a in attachments for _, adapter in a.parts.values() for p in adapter.parameters()):
            if torch.equal(parameter.to(kind).to(parameter.dtype), parameter):
                parameter.data = parameter.data.to(kind)


def _reject_existing(places: Sequence[Path]) -> None:
    for place in places:
        if place.exists():
            raise SaveError(f"{place}: already exists. Give another --out.", file=place, given="exists")


def _notes(file: File, known: Format, to: str, tokens: Sequence[Path]) -> list[str]:
    """Remarks on what the new file does not contain."""
    notes = [f"token embedding in {path.name}: its trigger in A1111 and ComfyUI is {path.stem}" for path in tokens]
    if known.name != to and file.metadata:
        keys = [key for key in file.metadata if key != "format"]
        names = ", ".join(keys[:4]) + (" …" if len(keys) > 4 else "")
        notes += [f"not copied: {len(keys)} metadata entries ({names})"] if keys else []
    return notes
