"""LoRA read from a file whose layers are known by name, whatever its producer calls the tensors of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.injection import LoadError

from .._io.reader import File
from .._names.kohya import Place
from .._names.kohya_fused import Pair, split
from .attach import Wanted
from .families import family_of, told
from .format import Layer, Options, values
from .lora_config import Found, config_of, shaped

DOWN, UP, MID, ALPHA = PARTS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")
KOHYA = {part: part for part in PARTS}  # end of a key to what it is
OTHERS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT",
    "a1.": "GLoRA", "on_input": "(IA)³", "diff": "full weights", "w_norm": "norms", "b_norm": "norms",
    "set_weight": "weights of its own", "reshape_weight": "weights of another shape", "lora_B.bias": "a bias",
    "lora_up.bias": "a bias",
}  # fmt: skip


class Read(NamedTuple):
    """The tensors of each layer by what they are, the keys of each layer, and keys that are part of none."""

    layers: dict[str, dict[str, Tensor]]
    keys: dict[str, list[str]]
    unused: list[str]


def wanted(
    model: Any,
    file: File,
    options: Options,
    known: Mapping[str, Place],
    ends: Mapping[str, str] = KOHYA,
    alphas: Callable[[str, int], float] | None = None,
) -> Wanted:
    """The lora attachment that gives the file's ΔW at every site.

    Args:
        known: the layers that the model has, by every name that they go by in the file.
        ends: how a key may end, without the dot before, to what the tensor is (of `PARTS`).
        alphas: name and rank of a layer to its alpha, if it is not in the tensors.
    Raises:
        LoadError: keys of other things than LoRA, layers that the model does not have, or a weight that is changed twice.
    """
    refuse_others(file, ends)
    layers, keys, unused = grouped(file.tensors(finite=options.strict), ends)
    found: dict[str, Found] = {}
    state: dict[str, Tensor] = {}
    for name, parts in layers.items():
        if name not in known or not whole(parts):
            unused += keys[name]
            continue
        if alphas is not None:
            parts.setdefault(ALPHA, torch.tensor(alphas(name, parts[DOWN].shape[0]), dtype=torch.float64))
        for site, low in split(file, name, known[name], pair(file, name, parts)):
            if site.name in found:
                message = f"{file.path}: '{name}' and a layer before it both change '{site.name}'. The file is damaged."
                raise LoadError(message, file=file.path, where=site.name, given=name)
            rank = low.down.shape[0]
            found[site.name] = Found(site, rank, low.scaling * rank)
            state[f"{site.name}:down"] = shaped(low.down, (rank, *site.weight_shape[1:]))
            state[f"{site.name}:up"] = shaped(low.up, (site.d_out, rank, *(1,) * len(site.kernel)))
    unused = list(dict.fromkeys(unused))
    if (unused and options.strict) or not found:
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no weights "
            "of these names, or they are no whole pairs: load it on the pipeline that it was made for, or pass strict=False."
            f"{told(file)}",
            file=file.path,
            unused=unused,
            family=family_of(file.shapes) or "",
        )
    silent = sum(ALPHA not in parts for parts in layers.values())
    notes = [f"no alpha for {silent} of {len(layers)} modules: alpha = rank"] if silent and ALPHA in ends.values() else []
    return Wanted("lora", "lora", config_of(found), list(found), state, notes=notes, unused=unused)


def layers_of(file: File, ends: Mapping[str, str] = KOHYA) -> list[Layer]:
    """What is in a file, without a model: names, ranks and alphas."""
    tensors = file.tensors(finite=False, names={key for key in file.shapes if key.endswith(".alpha")})
    named: dict[str, list[str]] = {}
    for key in file.shapes:
        named.setdefault(_name(key, ends), []).append(key)
    return [_layer(file, name, keys, ends, tensors.get(f"{name}.alpha")) for name, keys in named.items()]


def _layer(file: File, name: str, keys: list[str], ends: Mapping[str, str], alpha: Tensor | None) -> Layer:
    others = [what for key in keys if (what := other(key, ends))]
    shape = next((file.shapes[k] for k in keys if ends.get(k[len(name) + 1 :]) == DOWN), None)
    rank = shape[0] if shape else None
    said = float(alpha) if alpha is not None and alpha.numel() == 1 else rank
    method = others[0] if others else "lora" if shape else "unknown"
    return Layer(name, method, rank, said, values(file, keys))


def _name(key: str, ends: Mapping[str, str]) -> str:
    """The layer that a key is of: all before a known end, else before the last word but `.weight` and `.bias`."""
    end = _end(key, ends)
    if end is None:
        end = next((rest for start in OTHERS if (i := key.rfind(f".{start}")) >= 0 and (rest := key[i + 1 :])), None)
    return key[: -len(end) - 1] if end else key.removesuffix(".weight").rpartition(".")[0] or key


def _end(key: str, ends: Mapping[str, str]) -> str | None:
    return next((end for end in ends if key.endswith("." + end)), None)


def other(key: str, ends: Mapping[str, str] = KOHYA) -> str | None:
    """What a key is of that is no LoRA."""
    if _end(key, ends) is not None:
        return None
    return next((what for start, what in OTHERS.items() if f".{start}" in key), None)


def refuse_others(file: File, ends: Mapping[str, str] = KOHYA) -> None:
    """Raise if a key is of a change that is no LoRA: without it the rest would be another model."""
    for key in file.shapes:
        what = other(key, ends)
        if what is not None:
            raise LoadError(
                f"{file.path}: '{key}' is {what}, not LoRA: without it the rest would be wrong, so nothing is loaded.",
                file=file.path,
                where=key,
                given=what,
                expected="LoRA",
            )


def grouped(tensors: Mapping[str, Tensor], ends: Mapping[str, str]) -> Read:
    """The tensors of each layer, by name."""
    layers: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unused: list[str] = []
    for key, tensor in tensors.items():
        end = _end(key, ends)
        if end is None or ends[end] in layers.get(key[: -len(end) - 1], ()):  # or a second one of what is there already
            unused.append(key)
        else:
            layers.setdefault(key[: -len(end) - 1], {})[ends[end]] = tensor
            keys.setdefault(key[: -len(end) - 1], []).append(key)
    return Read(layers, keys, unused)


def whole(parts: Mapping[str, Tensor]) -> bool:
    """True if `down` and `up` are both there and have one rank."""
    down, up = parts.get(DOWN), parts.get(UP)
    return down is not None and up is not None and min(down.ndim, up.ndim) > 1 and 0 < down.shape[0] == up.shape[1]


def pair(file: File, name: str, parts: Mapping[str, Tensor]) -> Pair:
    """The pair of one layer; a Tucker core becomes part of `down`.

    Raises:
        LoadError: the core does not fit, or alpha is no number.
    """
    down, up, mid = parts[DOWN], parts[UP], parts.get(MID)
    rank = down.shape[0]
    alpha = alpha_of(file, name, parts.get(ALPHA), rank)
    if mid is not None:
        if mid.ndim < 3 or mid.shape[:2] != (rank, rank) or down.numel() != rank * down.shape[1]:
            raise LoadError(
                f"{file.path}: '{name}.lora_mid.weight' is {tuple(mid.shape)} between down {tuple(down.shape)} and up "
                f"{tuple(up.shape)}; expected ({rank}, {rank}, k, k) and 1×1. The file is damaged.",
                file=file.path,
                where=f"{name}.lora_mid.weight",
                given=tuple(mid.shape),
                expected=(rank, rank),
            )
        down = torch.einsum("ab...,bi->ai...", mid.double(), down.double().flatten(1)).to(torch.float32)
    return Pair(down, up, alpha / rank)


def alpha_of(file: File, name: str, tensor: Tensor | None, rank: int) -> float:
    """The alpha of a layer; its rank where the file says none.

    Raises:
        LoadError: it is no single number, or 0, of which the tools make different things.
    """
    if tensor is None:
        return float(rank)
    if tensor.numel() != 1:
        message = f"{file.path}: '{name}.alpha' has shape {tuple(tensor.shape)}; it must be one number. It is damaged."
        raise LoadError(message, file=file.path, where=f"{name}.alpha", given=tuple(tensor.shape), expected=())
    if not math.isfinite(float(tensor)):
        message = f"{file.path}: '{name}.alpha' is {float(tensor)}. It is damaged: write the alpha that is meant."
        raise LoadError(message, file=file.path, where=f"{name}.alpha", given=float(tensor))
    if float(tensor) == 0:
        raise LoadError(
            f"{file.path}: '{name}.alpha' is 0, which sd-scripts take for the rank when they train and for no change when they "
            "merge. Write the alpha that is meant, or take it out for alpha = rank.",
            file=file.path,
            where=f"{name}.alpha",
            given=0.0,
        )
    return float(tensor)
