"""A snapshot of everything that an attach could leave behind on a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from veneer.injection.quantized_weight import stored_parts

PLAIN = (bool, int, float, str, bytes, tuple, frozenset, type(None))
Facts = dict[str, Any]


def snapshot(model: nn.Module) -> Facts:
    """Names, order, types, tensors and their identity, flags, modes, hooks and attributes of every module."""
    facts: Facts = {"state_dict keys": list(model.state_dict())}
    facts["global hooks"] = {k: list(v.values()) for k, v in vars(torch_module).items() if _are_hooks(k, v)}
    facts["modules"] = [name for name, _ in model.named_modules()]
    for name, module in model.named_modules():
        facts.update({f"{name or 'the model'}: {key}": value for key, value in _facts(module)})
    return facts


def assert_same(before: Facts, after: Facts, what: str) -> None:
    """Compares two snapshots.

    Raises:
        AssertionError: names the first few differences.
    """
    found = [key for key in before if key not in after or not _equal(before[key], after[key])]
    found += [f"{key} (new)" for key in after if key not in before]
    if found:
        raise AssertionError(f"{what}: the host was not restored: {'; '.join(found[:5])}")


def _facts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "type", type(module)
    yield "attributes", list(module.__dict__)
    for key, value in module.__dict__.items():
        if key in ("_parameters", "_buffers"):
            for name, tensor in value.items():
                replaced = name in module._non_persistent_buffers_set
                yield f"tensor {name}", None if tensor is None else _TensorState(module, tensor, replaced)
            yield f"order of {key}", list(value)
        elif key == "_modules":
            yield "children", list(value.items())
        elif isinstance(value, dict):
            yield f"attribute {key}", list(value.items())
        elif isinstance(value, PLAIN):
            yield f"attribute {key}", value
        else:
            yield f"attribute {key}", [value]


class _TensorState:
    """A tensor of a module: the object, a copy of its values (and scales, if it is quantized), and its requires_grad flag.

    Args:
        replaced: True if another object with the same values is equal: a forward pass of OmniGen computes a buffer anew.
    """

    def __init__(self, module: nn.Module, tensor: Tensor, replaced: bool) -> None:
        self.tensor, self.flag, self.replaced = tensor, tensor.requires_grad, replaced
        self.values = [part.detach().clone() for _, part in stored_parts(module, "", tensor)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _TensorState):
            return False
        is_same = self.tensor is other.tensor or self.replaced
        if not is_same or self.flag != other.flag or len(self.values) != len(other.values):
            return False
        pairs = zip(self.values, other.values, strict=True)
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]


def _equal(a: Any, b: Any) -> bool:
    """Equality of plain values and of the containers above, identity of everything else."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    return isinstance(a, (*PLAIN, _TensorState)) and bool(a == b)


def _are_hooks(name: str, value: Any) -> bool:
    return name.startswith("_global_") and isinstance(value, dict)
