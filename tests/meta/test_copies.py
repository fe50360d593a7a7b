"""The fast copy of a module is a deep copy: equal attributes, no shared mutable objects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.injection.registry import hosts
from veneer.testing.case import fresh_model
from veneer.testing.copies import copy_module


def held(module: nn.Module) -> dict[str, Any]:
    """Attributes of every module by name: type, and value of plain attributes."""
    return {
        f"{name}.{key}": (
            type(value),
            contents(value) if isinstance(value, (dict, set, list)) else value if plain(value) else None,
        )
        for name, each in module.named_modules()
        for key, value in vars(each).items()
    }


def contents(value: Any) -> tuple[Any, ...]:
    return tuple(repr(each) if isinstance(each, Tensor) else each for each in value)


def plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple)) and not isinstance(value, Tensor)


@pytest.mark.parametrize(("host", "model"), [(n, m) for n in hosts.names() for m in hosts.get(n)().tiny()])
def test_it_equals_a_deep_copy(host: str, model: str) -> None:
    built = fresh_model(hosts.get(host)(), model)
    quick, slow = copy_module(built), copy.deepcopy(built)
    assert held(quick) == held(slow)
    for (name, got), (other, expected) in zip(tensors(quick), tensors(slow), strict=True):
        assert (name, got.dtype, got.requires_grad, type(got)) == (other, expected.dtype, expected.requires_grad, type(expected))
        assert torch.equal(got, expected)
    assert not changeable(quick) & changeable(built)


def tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def changeable(module: nn.Module) -> set[int]:
    """Addresses of mutable objects."""
    found = {tensor.data_ptr() for _, tensor in tensors(module) if tensor.numel()}
    for each in module.modules():
        found |= {id(each), *(id(value) for value in vars(each).values() if isinstance(value, (dict, set, list)))}
    return found


def test_shared_objects_stay_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
            self.two.weight = self.one.weight
            self.again = self.one
            self.also: Any = [self.one]
            self.notes: Any = {}
            self.same = self.notes
            self.one.register_forward_hook(self.hook)

        def hook(self, module: nn.Module, args: Any, output: Any) -> None:
            self.notes["called"] = True

    net = Net()
    made: Any = copy_module(net)
    assert made.again is made.one is made.also[0] is not net.one
    assert made.two.weight is made.one.weight is not net.one.weight
    assert made.same is made.notes is not net.notes
    made.one(torch.ones(1, 2))
    assert made.notes == {"called": True}
    assert net.notes == {}


def test_custom_copy_methods_are_used() -> None:
    class Own(nn.Module):
        def __deepcopy__(self, memo: Any) -> Own:
            made = Own()
            made.mark = "copied"
            return made

    class Less(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = [1]

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "cache": []}

    made: Any = copy_module(nn.Sequential(Own(), Less()))
    assert made[0].mark == "copied"
    assert made[1].cache == []
