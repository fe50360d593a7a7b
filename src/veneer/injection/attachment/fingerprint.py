"""Identity of a base model, so that an adapter is not loaded onto another: class, sizes and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..composition.merge import host_tensors
from .model_state import find_model_state, statistics

SAMPLES = 4096


def identity(tower: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """Class, integer entries of the config, and fingerprint, as JSON values. On `meta`, the config is None."""
    config = None if any(parameter.is_meta for parameter in tower.parameters()) else _sizes(tower)
    return {"class": _class(tower), "config": config, "fingerprint": fingerprint(tower, without)}


def _class(tower: nn.Module) -> str:
    """The name of its class, not of the subclass that torch creates while one of its parameters is parametrized."""
    made: type = type(tower)
    return (made.__bases__[0] if parametrize.is_parametrized(tower) else made).__name__


def fingerprint(tower: nn.Module, without: Collection[str] = ()) -> str | None:
    """SHA-256 of the names, shapes and sign bits of up to 4,096 evenly spaced values of every floating-point tensor.

    Computed for the bare host: without adapters, and with the original values of base parameters that an attachment trains. Norm
    statistics and integers are skipped. A cast to half precision keeps every sign bit, also of values that it rounds to zero
    (negative ones to −0), so that the fingerprint does not change; zeros of different sign count as different.

    Args:
        without: names of tensors to skip: those that the file contains.
    Returns:
        64 hexadecimal digits, or None for a model on `meta` or with quantized parameters, which cannot be compared.
    """
    skipped = {*without, *(name for name, _ in statistics(tower.named_modules()))}
    before = _before_training(tower)
    found = [(n, before.get(n, t)) for n, t in host_tensors(tower) if n not in skipped]
    parameters = {name for name, _ in tower.named_parameters()}
    if any(t.is_meta or (n in parameters and not t.is_floating_point()) for n, t in found):
        return None
    digest = hashlib.sha256()
    floats = [(n, t) for n, t in found if t.is_floating_point() and t.numel()]
    signs = [_signs(t) for _, t in floats]
    bits = torch.cat(signs).cpu().numpy().tobytes() if signs else b""  # one transfer from an accelerator
    end = 0
    for (name, tensor), sign in zip(floats, signs, strict=True):
        start, end = end, end + len(sign)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + bits[start:end])
    return digest.hexdigest()


def _signs(tensor: Tensor) -> Tensor:
    """Sign bits of evenly spaced values, one byte each."""
    step = -(-tensor.numel() // SAMPLES)
    return torch.signbit(tensor.reshape(-1)[::step].float())


def _before_training(tower: nn.Module) -> dict[str, Tensor]:
    tower_state, before = find_model_state(tower), dict[str, Tensor]()
    for attachment in tower_state.attachments if tower_state else ():
        for key, (component, path) in attachment.extras.items():
            if attachment.towers[component] is tower:
                before.setdefault(path, attachment.trained.original[key])
    return before


def _sizes(tower: nn.Module) -> dict[str, Any]:
    config: Any = getattr(tower, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    return dict(_integers(config)) if isinstance(config, Mapping) else {}


def _integers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries that are integers or lists of integers, by name."""
    for key in sorted(k for k in config if not k.startswith("_")):
        value = list(config[key]) if isinstance(config[key], (list, tuple)) else config[key]
        if all(type(v) is int for v in (value if isinstance(value, list) else [value])) and value != []:
            yield key, value
