"""Small models with quantized layers, for the tests: a transformer that is wide enough for blocks of 64 weights."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from veneer.base_models import KINDS, quantize_model
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection.quantized_weight import RECORD, float_weight, is_quantized

EXACT = tuple(name for name in KINDS if name != "int8")
"""Kinds whose forward pass in evaluation mode is that in training mode; `int8` also rounds its inputs, on a CPU only there."""


def needs(kind: str) -> pytest.MarkDecorator:
    """Skips a test if the library of a kind is not installed."""
    library = KINDS[kind].library
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def kinds(names: Any = KINDS) -> Any:
    """Parametrizes a test by kinds."""
    return pytest.mark.parametrize("kind", [pytest.param(name, marks=needs(name)) for name in names])


def dit(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A float transformer of two blocks, whose weights are moved off their initial values."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=2, in_channels=4,
            num_embeds_ada_norm=10,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
    return model.to(dtype).requires_grad_(False)


def quantized_dit(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same with quantized blocks."""
    model = dit(dtype=dtype)
    quantize_model(model, kind)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The model with float layers that hold the dequantized weights, in place."""
    for path, module in list(model.named_modules()):
        if is_quantized(module._parameters.get("weight")):
            layer = nn.Linear(module.in_features, module.out_features, device="meta")
            layer.weight, layer.bias = nn.Parameter(float_weight(module).clone(), requires_grad=False), module.bias
            owner, _, name = path.rpartition(".")
            model.get_submodule(owner)._modules[name] = layer
    return model


def layers(model: nn.Module) -> list[str]:
    """Paths of the layers that veneer has quantized."""
    return [path for path, module in model.named_modules() if RECORD in module.__dict__]


def _copy(tensor: Any, memo: dict[int, Any]) -> Any:
    names, context = tensor.__tensor_flatten__()
    inner = {name: copy.deepcopy(getattr(tensor, name), memo) for name in names}
    made = type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@functools.cache
def let_quanto_copy() -> None:
    """Adds deep copies, which the conformance suite makes, to the tensors of optimum-quanto, which lack them."""
    from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor
    from optimum.quanto.tensor.packed import PackedTensor

    for cls in (WeightQBitsTensor, WeightQBytesTensor, PackedTensor):
        cls.__deepcopy__ = _copy


def host_of(kind: str) -> type[DiffusersDiT]:
    """A host for the conformance suite, whose small model is quantized."""

    if KINDS[kind].library == "optimum":
        let_quanto_copy()

    def tiny(self: DiffusersDiT) -> dict[str, Callable[[], nn.Module]]:
        return {kind: functools.partial(quantized_dit, kind)}

    return type(f"Quantized_{kind}", (DiffusersDiT,), {"tiny": tiny})
