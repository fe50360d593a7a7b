"""Reads LoRA from a file whose layers are identified by name, for any naming of a layer's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.injection import LoadError

from .._io.reader import File
from .._names.kohya import NamedLayer
from .._names.kohya_fused import LoRAFactors, split_factors
from .attach import AttachmentSpec
from .families import family_of, family_sentence
from .format import LayerInfo, Options, count_parameters
from .lora_config import LoRALayer, config_of, match_shape

DOWN, UP, MID, ALPHA = PARTS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")
KOHYA = {part: part for part in PARTS}  # key suffix -> kind of tensor
OTHER_KINDS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT",
    "a1.": "GLoRA", "on_input": "(IA)³", "diff": "full weights", "w_norm": "norms", "b_norm": "norms",
    "set_weight": "a replacement weight", "reshape_weight": "a weight of another shape", "lora_B.bias": "a bias",
    "lora_up.bias": "a bias",
}  # fmt: skip


class GroupedTensors(NamedTuple):
    """The tensors of each layer by kind, the keys of each layer, and keys that belong to no layer."""

    layers: dict[str, dict[str, Tensor]]
    keys: dict[str, list[str]]
    unused: list[str]


def lora_spec(
    model: Any,
    file: File,
    options: Options,
    known: Mapping[str, NamedLayer],
    suffixes: Mapping[str, str] = KOHYA,
    alphas: Callable[[str, int], float] | None = None,
) -> AttachmentSpec:
    """Specification of the lora attachment that has the file's ΔW at every site.

    Args:
        known: the layers of the model, by every name that the file may use.
        suffixes: key suffix, without the leading dot -> kind of tensor (one of `PARTS`).
        alphas: maps the name and rank of a layer to its alpha, if it is not stored as a tensor.
    Raises:
        LoadError: keys of adapters other than LoRA, layers that the model does not have, or two updates of one weight.
    """
    reject_other_kinds(file, suffixes)
    layers, keys, unused = group_tensors(file.tensors(finite=options.strict), suffixes)
    found: dict[str, LoRALayer] = {}
    state: dict[str, Tensor] = {}
    for name, parts in layers.items():
        if name not in known or not is_complete(parts):
            unused += keys[name]
            continue
        if alphas is not None:
            parts.setdefault(ALPHA, torch.tensor(alphas(name, parts[DOWN].shape[0]), dtype=torch.float64))
        for site, low in split_factors(file, name, known[name], read_factors(file, name, parts)):
            if site.name in found:
                message = f"{file.path}: '{name}' and an earlier layer both update '{site.name}'. The file is corrupt."
                raise LoadError(message, file=file.path, where=site.name, given=name)
            rank = low.down.shape[0]
            found[site.name] = LoRALayer(site, rank, low.scaling * rank)
            state[f"{site.name}:down"] = match_shape(low.down, (rank, *site.weight_shape[1:]))
            state[f"{site.name}:up"] = match_shape(low.up, (site.d_out, rank, *(1,) * len(site.kernel)))
    unused = list(dict.fromkeys(unused))
    if (unused and options.strict) or not found:
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no weights "
            "of these names, or a factor is missing. Load it on the pipeline it was made for, or pass strict=False."
            f"{family_sentence(file)}",
            file=file.path,
            unused=unused,
            family=family_of(file.shapes) or "",
        )
    silent = sum(ALPHA not in parts for parts in layers.values())
    notes = [f"no alpha in {silent} of {len(layers)} layers: alpha = rank"] if silent and ALPHA in suffixes.values() else []
    return AttachmentSpec("lora", "lora", config_of(found), list(found), state, notes=notes, unused=unused)


def layers_of(file: File, suffixes: Mapping[str, str] = KOHYA) -> list[LayerInfo]:
    """Layers of a file, without a model: names, ranks and alphas."""
    tensors = file.tensors(finite=False, names={key for key in file.shapes if key.endswith(".alpha")})
    by_layer: dict[str, list[str]] = {}
    for key in file.shapes:
        by_layer.setdefault(_layer_name(key, suffixes), []).append(key)
    return [_layer(file, name, keys, suffixes, tensors.get(f"{name}.alpha")) for name, keys in by_layer.items()]


def _layer(file: File, name: str, keys: list[str], suffixes: Mapping[str, str], alpha: Tensor | None) -> LayerInfo:
    others = [what for key in keys if (what := other_kind(key, suffixes))]
    shape = next((file.shapes[k] for k in keys if suffixes.get(k[len(name) + 1 :]) == DOWN), None)
    rank = shape[0] if shape else None
    value = float(alpha) if alpha is not None and alpha.numel() == 1 else rank
    method = others[0] if others else "lora" if shape else "unknown"
    return LayerInfo(name, method, rank, value, count_parameters(file, keys))


def _layer_name(key: str, suffixes: Mapping[str, str]) -> str:
    """Layer name of a key: the part before a known suffix, else before the last component other than `.weight` and `.bias`."""
    end = _suffix(key, suffixes)
    if end is None:
        end = next((rest for start in OTHER_KINDS if (i := key.rfind(f".{start}")) >= 0 and (rest := key[i + 1 :])), None)
    return key[: -len(end) - 1] if end else key.removesuffix(".weight").rpartition(".")[0] or key


def _suffix(key: str, suffixes: Mapping[str, str]) -> str | None:
    return next((end for end in suffixes if key.endswith("." + end)), None)


def other_kind(key: str, suffixes: Mapping[str, str] = KOHYA) -> str | None:
    """Kind of adapter that a key belongs to, if it is not LoRA."""
    if _suffix(key, suffixes) is not None:
        return None
    return next((what for start, what in OTHER_KINDS.items() if f".{start}" in key), None)


def reject_other_kinds(file: File, suffixes: Mapping[str, str] = KOHYA) -> None:
    """Raises if a key belongs to an adapter other than LoRA: loading only the rest would give a different model."""
    for key in file.shapes:
        what = other_kind(key, suffixes)
        if what is not None:
            raise LoadError(
                f"{file.path}: '{key}' is {what}, not LoRA. The other tensors alone would be wrong, so nothing was loaded.",
                file=file.path,
                where=key,
                given=what,
                expected="LoRA",
            )


def group_tensors(tensors: Mapping[str, Tensor], suffixes: Mapping[str, str]) -> GroupedTensors:
    """Groups tensors by layer name."""
    layers: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unused: list[str] = []
    for key, tensor in tensors.items():
        end = _suffix(key, suffixes)
        if end is None or suffixes[end] in layers.get(key[: -len(end) - 1], ()):  # or a duplicate
            unused.append(key)
        else:
            layers.setdefault(key[: -len(end) - 1], {})[suffixes[end]] = tensor
            keys.setdefault(key[: -len(end) - 1], []).append(key)
    return GroupedTensors(layers, keys, unused)


def is_complete(parts: Mapping[str, Tensor]) -> bool:
    """True if `down` and `up` are both present and have the same rank."""
    down, up = parts.get(DOWN), parts.get(UP)
    return down is not None and up is not None and min(down.ndim, up.ndim) > 1 and 0 < down.shape[0] == up.shape[1]


def read_factors(file: File, name: str, parts: Mapping[str, Tensor]) -> LoRAFactors:
    """The factors of one layer; a Tucker core is multiplied into `down`.

    Raises:
        LoadError: the core has a wrong shape, or alpha is not a finite scalar.
    """
    down, up, mid = parts[DOWN], parts[UP], parts.get(MID)
    rank = down.shape[0]
    alpha = alpha_of(file, name, parts.get(ALPHA), rank)
    if mid is not None:
        if mid.ndim < 3 or mid.shape[:2] != (rank, rank) or down.numel() != rank * down.shape[1]:
            raise LoadError(
                f"{file.path}: '{name}.lora_mid.weight' is {tuple(mid.shape)} between down {tuple(down.shape)} and up "
                f"{tuple(up.shape)}; expected ({rank}, {rank}, k, k) and 1×1 factors. The file is corrupt.",
                file=file.path,
                where=f"{name}.lora_mid.weight",
                given=tuple(mid.shape),
                expected=(rank, rank),
            )
        down = torch.einsum("ab...,bi->ai...", mid.double(), down.double().flatten(1)).to(torch.float32)
    return LoRAFactors(down, up, alpha / rank)


def alpha_of(file: File, name: str, tensor: Tensor | None, rank: int) -> float:
    """The alpha of a layer; its rank if the file has no alpha.

    Raises:
        LoadError: it is not a scalar, not finite, or 0, which tools interpret in different ways.
    """
    if tensor is None:
        return float(rank)
    if tensor.numel() != 1:
        message = f"{file.path}: '{name}.alpha' has shape {tuple(tensor.shape)}; expected a scalar. The file is corrupt."
        raise LoadError(message, file=file.path, where=f"{name}.alpha", given=tuple(tensor.shape), expected=())
    if not math.isfinite(float(tensor)):
        message = f"{file.path}: '{name}.alpha' is {float(tensor)}; expected a finite number. Write the intended alpha."
        raise LoadError(message, file=file.path, where=f"{name}.alpha", given=float(tensor))
    if float(tensor) == 0:
        raise LoadError(
            f"{file.path}: '{name}.alpha' is 0, which sd-scripts interprets as the rank in training and as zero strength in "
            "merging. Write the intended alpha, or remove it for alpha = rank.",
            file=file.path,
            where=f"{name}.alpha",
            given=0.0,
        )
    return float(tensor)
