"""Moves of bitsandbytes' 8-bit layers between devices, emulated by copies to new memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.base_models.quantized import layers, needs, quantized_dit
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection.quantized_weight import RECORD, is_quantized

pytestmark = needs("int8")


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**DiffusersDiT().sample(model), return_dict=False)[0]


def tensors(layer: Any) -> list[Tensor]:
    """Everything that a layer stores, aliases included."""
    stored = [layer.weight, layer.bias, layer.weight.CB, layer.weight.SCB, layer.state.CB, layer.state.SCB]
    return [tensor.data for tensor in stored if tensor is not None]


@pytest.mark.parametrize("ran", [False, True], ids=["before the first forward pass", "after it"])
@pytest.mark.parametrize("attached", [False, True], ids=["bare", "adapted"])
def test_a_move_leaves_nothing_in_the_old_memory(ran: bool, attached: bool) -> None:
    model = quantized_dit("int8")
    if attached:
        veneer.attach(model, "lora")
    expected = run(copy.deepcopy(model))
    if ran:
        run(model)
    before = {name: tensors(model.get_submodule(name)) for name in layers(model)}
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model._apply(torch.clone)
    for name, old in before.items():
        layer = model.get_submodule(name)
        assert not {t.data_ptr() for t in old} & {t.data_ptr() for t in tensors(layer)}
        owner = layer.state if ran else layer.weight
        assert owner.CB.data_ptr() == layer.weight.data_ptr()
        assert is_quantized(layer.weight)
        assert RECORD in layer.__dict__
    assert torch.equal(run(model), expected)
    after = model.state_dict()
    assert after.keys() == states.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in states.items())


@pytest.mark.parametrize("ran", [False, True], ids=["before the first forward pass", "after it"])
def test_a_cast_keeps_the_scale(ran: bool) -> None:
    model = quantized_dit("int8")
    if ran:
        run(model)
    scales = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("SCB")}
    after = nn.Module.to(model, torch.float64).state_dict()
    assert scales
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], scale) for name, scale in scales.items())
