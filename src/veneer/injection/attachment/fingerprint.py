"""Identity of a base model, so that an adapter is not loaded onto another: class, sizes and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..composition.merge import host_tensors
from ..quantized_weight import QuantizationRecord, is_quantized, quantization_of, record_of
from ..sharded_tensor import full_tensor, unsharded_class
from .model_state import find_model_state, statistics

SAMPLES = 4096


def identity(tower: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """Class, integer entries of the config, fingerprint and any quantization, as JSON values. On `meta`, the config is None."""
    config = None if any(parameter.is_meta for parameter in tower.parameters()) else _sizes(tower)
    quantization = quantization_of(tower)
    return {
        "class": _class(tower),
        "config": config,
        "fingerprint": fingerprint(tower, without),
        **({} if quantization is None else {"quantization": quantization}),
    }


def _class(tower: nn.Module) -> str:
    """The name of its class, not of the subclass that torch creates for a sharded model or a parametrized parameter."""
    made = unsharded_class(type(tower))
    return (made.__bases__[0] if parametrize.is_parametrized(tower) else made).__name__


def fingerprint(tower: nn.Module, without: Collection[str] = ()) -> str | None:
    """SHA-256 of the names, shapes and sign bits of up to 4,096 evenly spaced values of every floating-point tensor.

    Computed for the bare host: without adapters, and with the original values of base parameters that an attachment trains. Norm
    statistics and integers are skipped. A cast to half precision keeps every sign bit, also of values that it rounds to zero
    (negative ones to −0), so that the fingerprint does not change; zeros of different sign count as different.
    Every process must call it for a sharded model, whose tensors it gathers one by one.

    Layers that veneer quantized count with the shape and sign bits of their float weights.

    Args:
        without: names of tensors to skip: those that the file contains.
    Returns:
        64 hexadecimal digits, or None for a model on `meta` or quantized by another tool, which cannot be compared.
    """
    skipped = {*without, *(name for name, _ in statistics(tower.named_modules()))}
    before = _before_training(tower)
    records = _records(tower)
    found = [
        (n, before.get(n, t)) for n, t in host_tensors(tower, scales=False) if n not in skipped and not _is_scale(n, records)
    ]
    parameters = {name for name, _ in tower.named_parameters()}
    if any(t.is_meta or (n in parameters and n not in records and not _is_float(t)) for n, t in found):
        return None
    digest = hashlib.sha256()
    device = next((t.device for _, t in found), torch.device("cpu"))
    floats: list[tuple[str, Any]] = [
        (n, records.get(n, t)) for n, t in found if n in records or (t.is_floating_point() and t.numel())
    ]
    signs = [(t.signs if isinstance(t, QuantizationRecord) else sign_bits(t)).to(device) for _, t in floats]
    bits = torch.cat(signs).cpu().numpy().tobytes() if signs else b""  # one transfer from an accelerator
    end = 0
    for (name, tensor), sign in zip(floats, signs, strict=True):
        start, end = end, end + len(sign)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + bits[start:end])
    return digest.hexdigest()


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not is_quantized(tensor)


def _records(tower: nn.Module) -> dict[str, QuantizationRecord]:
    """Name of a weight that veneer quantized to its record."""
    modules = ((path, record_of(module)) for path, module in tower.named_modules())
    return {f"{path}.weight" if path else "weight": record for path, record in modules if record is not None}


def _is_scale(name: str, records: Collection[str]) -> bool:
    """True for a buffer beside a quantized weight, which the float layer does not have."""
    owner, _, param = name.rpartition(".")
    return param not in ("weight", "bias") and (f"{owner}.weight" if owner else "weight") in records


def sign_bits(tensor: Tensor) -> Tensor:
    """Sign bits of evenly spaced values, one byte each."""
    step = -(-tensor.numel() // SAMPLES)
    return torch.signbit(full_tensor(tensor).reshape(-1)[::step].float())


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
