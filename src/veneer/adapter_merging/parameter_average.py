"""Weighted mean of the parameters of several adapters of one method: AdapterSoup, and MerA with aligned neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.formats._core.attach import is_head_method
from veneer.formats._core.stored_adapters import StoredFile, method_of_entry, write_native
from veneer.formats._io.composition_header import KEY as COMPOSITION
from veneer.injection.composition.nodes import node_from_json
from veneer.injection.errors import OptionError

from .adapter_files import MERGEABLE, new_file
from .delta_weights import CombineError
from .neuron_alignment import align
from .stored_files import differs, merged_header, read_files

Activations = Mapping[str, Tensor]


def average_files(
    paths: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None = None,
    *,
    aligned: bool = False,
    activations: Sequence[Activations] | None = None,
    heads: bool = True,
) -> Path:
    """Writes the weighted mean of the parameters of native files, θ = Σ w_n θ_n / Σ w_n, as one file of the same method.

    The mean is computed in float64, and saved in the dtype of the first file.

    Args:
        paths: the files. `out`: the new file.
        weights: one number for each file, finite, with a sum other than 0 (default: equal weights). Files of weight 0 are not
            used, such as those that `select_adapters` leaves out.
        aligned: MerA: permute the neurons of each bottleneck so that they match those of the first file by optimal transport.
        activations: with `aligned`, what the neurons give for the same inputs, for each file by site, as `record_activations`
            returns it (default: alignment by the weights).
        heads: average the heads of classifiers as well; False leaves them out, as for adapters of tasks with other classes.
    Returns:
        The file.
    Raises:
        LoadError: a file is of another format or corrupt. SaveError: `out` exists.
        CombineError: base models, methods, options, sites, shapes or compositions differ, a method merges ΔW (`combine`),
            `aligned` and the adapters are no bottlenecks, or a file has a head only and `heads` is False.
        OptionError: fewer than two files, or invalid weights.
    Source: Chronopoulou et al., AdapterSoup, Findings of EACL 2023: the uniform mean of the selected adapters, which were
    trained from one initialization. He et al., MerA: Merging Pretrained Adapters For Few-Shot Learning, 2023: alignment by
    weights or activations before the mean. Deviations: all neurons have equal mass, for which the optimal transport is a
    permutation, computed exactly; all adapters are aligned with the first one.
    """
    target = new_file(out, "native")
    files = read_files(paths)
    files = files if heads else [_without_heads(file) for file in files]
    shares = _weights(weights, len(files))
    for other in files[1:]:
        _compare_entries(files[0], other)
    states = []
    for index, entry in enumerate(files[0].entries):
        several = [file.states[index] for file in files]
        _compare_shapes(files, several)
        if aligned and not is_head_method(entry["method"]):
            several = [_align_state(several[0], each, _pair(activations, n)) for n, each in enumerate(several)]
        states.append(_mean(several, shares))
    header = merged_header(files, "aligned" if aligned else "parameters", shares)
    header |= {"base": files[0].header["base"], **_tree(files[0], files[0])}
    return write_native(target, header, files[0].entries, states)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    shares = torch.tensor([1.0] * count if weights is None else list(weights), dtype=torch.float64)
    if len(shares) != count or not shares.isfinite().all() or not shares.sum():
        expected = f"{count} finite numbers, one for each file, with a sum other than 0"
        raise OptionError.of("merge", "weights", weights, expected)
    return [float(share) for share in shares / shares.sum()]


def _without_heads(file: StoredFile) -> StoredFile:
    """A file without its attachments of the head."""
    pairs = zip(file.entries, file.states, strict=True)
    adapters = [(entry, state) for entry, state in pairs if not is_head_method(entry["method"])]
    if not adapters:
        given = tuple(entry["method"] for entry in file.entries)
        message = f"{file.path}: has only the head of a classifier ({', '.join(given)}); leave it out, or average the heads."
        raise CombineError(message, file=file.path, where="heads", given=given, expected="an adapter")
    header = {**file.header, "attachments": [entry for entry, _ in adapters]}
    return StoredFile(file.path, header, tuple(state for _, state in adapters))


def _compare_entries(first: StoredFile, other: StoredFile) -> None:
    """Raises `CombineError` if two files have other methods, options or sites."""
    given, expected = ([entry["method"] for entry in file.entries] for file in (other, first))
    if given != expected:
        raise differs("method", first, other, given, expected)
    trees = _tree(first, first), _tree(other, first)
    if trees[0] != trees[1]:
        raise differs("composition", first, other, trees[1], trees[0])
    by_delta = [name for name in given if name in MERGEABLE]
    if by_delta:
        message = f"{other.path}: {by_delta[0]} is a weight update, whose mean is that of ΔW. Merge it with --method svd."
        raise CombineError(message, file=other.path, where="method", given=by_delta[0], expected="svd")
    for index, (one, another) in enumerate(zip(first.entries, other.entries, strict=True)):
        configs = [method_of_entry(f, f.entries[index], f.states[index]).config() for f in (other, first)]
        sites = [sorted([*entry["sites"], *entry["trained"]]) for entry in (another, one)]
        for where, values in (("options", configs), ("sites", sites)):
            if values[0] != values[1]:
                raise differs(where, first, other, *values)


def _tree(file: StoredFile, first: StoredFile) -> dict[str, Any]:
    """Header entry of the composition of a file, with the names of the first file; empty without one."""
    if COMPOSITION not in file.header:
        return {}
    names = {entry["name"]: other["name"] for entry, other in zip(file.entries, first.entries, strict=True)}
    return {COMPOSITION: node_from_json(file.header[COMPOSITION]).rename(names).to_json()}


def _compare_shapes(files: Sequence[StoredFile], states: Sequence[Mapping[str, Tensor]]) -> None:
    for file, state in zip(files[1:], states[1:], strict=True):
        shapes = [{key: tuple(tensor.shape) for key, tensor in each.items()} for each in (state, states[0])]
        for key in shapes[0].keys() | shapes[1].keys():
            if shapes[0].get(key) != shapes[1].get(key):
                raise differs(key, files[0], file, shapes[0].get(key), shapes[1].get(key))


def _pair(activations: Sequence[Activations] | None, number: int) -> tuple[Activations, Activations] | None:
    return None if activations is None else (activations[0], activations[number])


def _align_state(
    reference: Mapping[str, Tensor], state: Mapping[str, Tensor], activations: tuple[Activations, Activations] | None
) -> dict[str, Tensor]:
    """A state with the neurons of every site aligned."""
    sites: dict[str, dict[str, str]] = {}
    for key in state:
        site, _, name = key.rpartition(":")
        sites.setdefault(site, {})[name] = key
    result: dict[str, Tensor] = {}
    for site, keys in sites.items():
        pair: Any = None if activations is None else tuple(each[site] for each in activations)
        tensors = [{name: each[key] for name, key in keys.items()} for each in (reference, state)]
        result |= {keys[name]: tensor for name, tensor in align(tensors[0], tensors[1], pair).items()}
    return result


def _mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ w θ of each tensor; tensors that are no floating point must be equal."""
    result: dict[str, Tensor] = {}
    stored: dict[tuple[int, ...], Tensor] = {}
    for key, first in states[0].items():
        several = [state[key] for state in states]
        place = tuple(tensor.data_ptr() for tensor in several)
        if not first.is_floating_point():
            if not all(torch.equal(first, tensor) for tensor in several):
                message = f"{key}: indices or bits that differ between the files have no mean."
                raise CombineError(message, where=key, given=str(first.dtype), expected="floating point")
            result[key] = first
            continue
        if place not in stored:  # a tensor that several sites share is averaged once
            total = sum(
                (w * t.double() for w, t in zip(weights, several, strict=True) if w), torch.zeros((), dtype=torch.float64)
            )
            stored[place] = total.to(first.dtype)
        result[key] = stored[place]
    return result
