"""Merging into quantized weights: dequantize, merge, quantize again, and measure what rounding loses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..quantized_weight import float_weight, is_quantized, record_of, release, requantize_weight
from ..seams.adapter_calls import base_tensor

TensorKey = tuple[str, str, str]  # component, module path, parameter name


@dataclass(frozen=True)
class Rounding:
    """Error of a merged weight W' that is quantized again: ‖Q(W') − W'‖ relative to ‖W'‖ and to the update ‖W' − Ŵ‖."""

    of_weight: float
    of_update: float


def merge_obstacle(module: nn.Module, param: str, tensor: Tensor, requantize: bool) -> tuple[str, str] | None:
    """Why adapters cannot be merged into a quantized weight: a keyword and a message. None if they can."""
    known = record_of(module, param) is not None
    hint = "pass requantize=True to quantize the sum again" if known else "it was not quantized by veneer"
    message = f"the weight is quantized ({type(tensor).__name__}): {hint}, or load the base model unquantized to merge."
    return None if known and requantize else ("quantized", message)


def quantize_again(
    towers: Mapping[str, nn.Module], before: Mapping[TensorKey, Tensor], after: dict[TensorKey, Tensor]
) -> dict[str, Rounding]:
    """Quantizes the merged weights in `after` whose original is quantized. Returns the error of each by name.

    Args:
        before: the float weights before the merge, `after`: the merged ones.
    """
    errors = {}
    for key, merged in after.items():
        component, path, param = key
        module = towers[component].get_submodule(path)
        if not is_quantized(base_tensor(module, "", param)):
            continue
        quantized = requantize_weight(module, param, merged)
        assert quantized is not None
        after[key] = quantized
        with _swap_parameter(module, param, quantized):
            error = (float_weight(module, param).float() - merged.float()).norm()
        norms = merged.float().norm(), (merged.float() - before[key].float()).norm()
        name = ".".join(filter(None, (component, path, param)))
        errors[name] = Rounding(*(float(error / norm) if norm else 0.0 for norm in norms))
    return errors


@contextlib.contextmanager
def _swap_parameter(module: Any, param: str, tensor: nn.Parameter) -> Iterator[None]:
    """The module with another parameter inside the block."""
    release(module, param)
    before, module._parameters[param] = module._parameters[param], tensor
    try:
        yield
    finally:
        module._parameters[param] = before
