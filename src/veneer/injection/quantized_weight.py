"""Quantized weights: recognized by their type, and dequantized by the library that quantized them.

| library | type of the weight | float weight |
| --- | --- | --- |
| bitsandbytes, 4 bits | `Params4bit`, packed | `dequantize_4bit` |
| bitsandbytes, 8 bits | `Int8Params`, with its scale in the weight or the layer's state | `int8_vectorwise_dequant` |
| torchao, optimum-quanto | a tensor subclass of the library | `dequantize()` |
| diffusers | `GGUFParameter`, packed | `dequantize_gguf_tensor` |

Widths of a layer come from its module, because a packed tensor has another shape.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateError, UnsupportedSite
from .seams.adapter_calls import base_tensor, module_at

PACKED = ("Params4bit", "Int8Params", "GGUFParameter")
LIBRARIES = ("torchao.", "optimum.quanto.")
RECORD = "_veneer_quantization"
ORDINARY: set[type] = {Tensor, nn.Parameter}
"""Classes of tensors that hold their values as they are."""


@dataclass(frozen=True)
class QuantizationRecord:
    """How veneer quantized a layer, kept in the module.

    Args:
        recipe: JSON values that identify the quantization, such as `{"kind": "nf4"}`.
        shape, signs: of the float weight, for the fingerprint of the base model.
        requantize: returns a parameter for this layer with the quantized values of a float weight.
        correction: A (r, d_in) and B (d_out, r) such that Ŵ + B A is nearer to W, in descending order, or None.
    """

    recipe: Mapping[str, Any]
    shape: tuple[int, ...]
    signs: Tensor
    requantize: Callable[[Tensor], nn.Parameter]
    correction: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> QuantizationRecord:
        """Itself: nothing in it changes."""
        return self


def is_quantized(tensor: Any) -> bool:
    """True for a weight that one of the libraries has quantized, by its type and not by its dtype."""
    kind = type(tensor)
    return kind.__name__ in PACKED or f"{kind.__module__}.".startswith(LIBRARIES)


def is_ordinary(tensor: Tensor) -> bool:
    """True for a floating-point tensor that is neither quantized nor sharded."""
    return tensor.is_floating_point() and type(tensor.data) in ORDINARY and not is_quantized(tensor)


def record_of(module: nn.Module, param: str = "weight") -> QuantizationRecord | None:
    """The record of a layer that veneer quantized, or None."""
    record: QuantizationRecord | None = module.__dict__.get(RECORD) if param == "weight" else None
    return record


def float_tensor(tower: nn.Module, path: str, param: str) -> Tensor:
    """The host's original parameter or buffer as `base_tensor` returns it, dequantized if it is quantized."""
    return float_weight(module_at(tower, path), param)


@torch.no_grad()
def float_weight(module: Any, param: str = "weight") -> Tensor:
    """A weight as its layer multiplies with it: W itself, or Ŵ, the dequantized values.

    Raises:
        StateError: bitsandbytes has repacked the weight for a CPU, so that it can no longer be dequantized.
    """
    tensor: Any = base_tensor(module, "", param)
    kind = type(tensor).__name__
    if not is_quantized(tensor) or tensor.is_meta:
        return tensor
    if kind == "Params4bit":
        if tensor.quant_state is None:
            return tensor
        _reject_repacked(tensor, param)
        return _function("bitsandbytes.functional", "dequantize_4bit")(tensor.data, tensor.quant_state)
    if kind == "Int8Params":
        scale = _scale(module, tensor)
        if scale is None:
            return tensor
        return _function("bitsandbytes.functional", "int8_vectorwise_dequant")(tensor.data, scale)
    if kind == "GGUFParameter":
        weight = _function("diffusers.quantizers.gguf.utils", "dequantize_gguf_tensor")(tensor)
        return weight.to(getattr(module, "compute_dtype", None) or weight.dtype)
    return tensor.dequantize()


def readable_weight(tower: nn.Module, site: Any, method: str, option: str = "") -> Tensor:
    """The host's weight at a site, dequantized if it is quantized, for a method that reads W.

    Args:
        method: name of the method. `option`: the option that needs W, or "".
    Raises:
        UnsupportedSite: it is in integers of an unknown library.
    """
    weight = float_tensor(tower, site.path, site.param)
    if not weight.is_floating_point():
        message = (
            f"{method}: {site.name}: the weight is quantized by an unknown library ({weight.dtype}). Load the base unquantized."
        )
        raise UnsupportedSite(message, site=site.name, method=method, option=option, given=weight.dtype)
    return weight


def requantize_weight(module: nn.Module, param: str, weight: Tensor) -> nn.Parameter | None:
    """A quantized parameter with new values; None for a layer that veneer did not quantize."""
    record = record_of(module, param)
    return None if record is None else record.requantize(weight)


def release(module: Any, param: str) -> None:
    """Prepares a layer for an exchange of its parameter: bitsandbytes moves the scale of 8 bits from the weight to the layer."""
    tensor = module._parameters.get(param)
    if type(tensor).__name__ == "Int8Params" and tensor.SCB is None:
        tensor.CB, tensor.SCB = tensor.data, module.state.SCB
        module.state.CB = module.state.SCB = None


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module tree as they are stored: parameters and buffers, quantized ones as their parts."""
    for path, owner in module.named_modules():
        start = f"{path}." if path else ""
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield from stored_parts(owner, f"{start}{name}", tensor)


def stored_parts(module: Any, name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and plain tensors of a module's tensor: itself, or the values and scales of a quantized one."""
    kind = type(tensor).__name__
    if kind == "Params4bit":
        yield name, tensor.data
        state = tensor.quant_state.as_dict(packed=True) if tensor.quant_state is not None else {}
        yield from ((f"{name}.{key}", value) for key, value in state.items())
    elif kind == "Int8Params":
        yield name, tensor.data
        if (scale := _scale(module, tensor)) is not None:
            yield f"{name}.SCB", scale
    elif kind == "GGUFParameter":
        yield name, tensor.as_tensor()
    elif is_quantized(tensor):
        yield from ((f"{name}.{number}", part) for number, part in enumerate(inner_tensors(tensor)))
    else:
        yield name, tensor


def stored_state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The part of the state dict that a quantized layer writes, with its scales."""
    state: dict[str, Tensor] = {}
    module._save_to_state_dict(state, prefix, False)
    return state


def inner_tensors(tensor: Any) -> list[Tensor]:
    """The plain tensors in a tensor subclass of torchao or optimum-quanto; the tensor itself, if it is another one."""
    if not (is_quantized(tensor) and hasattr(tensor, "__tensor_flatten__")):
        return [tensor]
    return [part for key in tensor.__tensor_flatten__()[0] for part in inner_tensors(getattr(tensor, key))]


def quantization_of(tower: nn.Module) -> dict[str, Any] | None:
    """Recipe of a tower's quantized layers and their number as JSON values; None for a float model."""
    recipes: list[Mapping[str, Any]] = []
    for module in tower.modules():
        tensor = module._parameters.get("weight")
        if (record := record_of(module)) is not None:
            recipes.append(record.recipe)
        elif tensor is not None and is_quantized(tensor):
            kind = getattr(tensor, "quant_type", None) or type(tensor).__name__
            recipes.append({"kind": getattr(kind, "name", str(kind)).lower()})
    if not recipes:
        return None
    kinds = sorted({recipe["kind"] for recipe in recipes})
    return {**recipes[0], "kind": "+".join(kinds), "layers": len(recipes)}


def keep_unpacked(tower: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for a CPU, which is in place, loses bits and blocks gradients.

    Raises:
        StateError: a weight is repacked already.
    """
    for path, module in tower.named_modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            _reject_repacked(module.weight, f"{path}.weight")
            module.support_avx512bf16_for_cpu = False


def _reject_repacked(tensor: Any, name: str) -> None:
    if getattr(tensor.quant_state, "packing_format_for_cpu", False):
        message = (
            f"{name}: bitsandbytes has repacked this 4-bit weight for the CPU in a forward pass, and its exact values are lost. "
            "Load the base model again and attach before the first forward pass, or load it with veneer."
        )
        raise StateError(message, where=name, given="repacked", expected="packed by quantization")


def _scale(module: Any, tensor: Any) -> Tensor | None:
    """The scale of an 8-bit weight of bitsandbytes; None before it is quantized."""
    if tensor.dtype != torch.int8:
        return None
    scale: Tensor | None = module.state.SCB if tensor.SCB is None else tensor.SCB
    return scale


def _function(module: str, name: str) -> Callable[..., Tensor]:
    """A function of a library that is loaded already, because a tensor has one of its types."""
    function: Callable[..., Tensor] = getattr(importlib.import_module(module), name)
    return function
