"""Optimizers by name, their learning rates, missing packages, and their state as tensors and JSON."""

import sys

import pytest
import torch
from torch import nn

from tests.raising import raises
from veneer.injection.errors import MissingExtra
from veneer.training.loop.errors import TrainError
from veneer.training.loop.optimizers import build, pack, set_rates, unpack
from veneer.training.loop.optimizers.catalog import load_class

EXTRAS = [
    ("adamw8bit", "bitsandbytes", "8bit"),
    ("prodigy", "prodigyopt", "prodigy"),
    ("schedule_free_adamw", "schedulefree", "optimizers"),
    ("came", "came_pytorch", "optimizers"),
    ("dadapt_adam", "dadaptation", "optimizers"),
]


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]


def groups(params):
    return [{"params": params[:1], "name": "image"}, {"params": params[1:], "name": "text", "lr_scale": 0.1, "weight_decay": 0.0}]


def steps(optimizer, params, first, last):
    for step in range(first, last):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()


def test_adamw_is_the_papers_first_step():
    """After one step with decoupled decay λ: w (1 − lr·λ) − lr · g / (|g| + eps)."""
    (p, _), gradient = parameters(), torch.full((4, 3), 0.5)
    expected = p.detach() * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-8)
    optimizer = build("adamw", [{"params": [p]}], 0.01, weight_decay=0.1)
    p.grad = gradient
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected)


def test_groups_have_their_own_rate_and_decay():
    optimizer = build("adamw", groups(parameters()), 0.02, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.02, 0.002])
    set_rates(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize(("name", "module", "extra"), EXTRAS)
def test_missing_package_names_the_extra(name, module, extra, monkeypatch):
    load_class.cache_clear()
    for key in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, key)
    monkeypatch.setitem(sys.modules, module, None)  # import fails, as without the package
    with raises(MissingExtra, where=name, given=module, expected=extra):
        build(name, groups(parameters()), 1e-3)


def test_an_empty_group_is_an_error():
    with raises(TrainError, where="text", given=0):
        build("adamw", [{"params": [], "name": "text"}], 1e-3)


def test_state_of_another_kind_starts_afresh():
    params = parameters()
    optimizer = build("sgd", groups(params), 0.01)
    steps(optimizer, params, 0, 1)
    tensors, values = pack(optimizer, dict(zip("ab", params, strict=True)))
    other = build("adamw", groups(params), 0.01)
    unpack(other, dict(zip("ab", params, strict=True)), tensors, values)
    assert not other.state


def test_state_of_unknown_parameters_is_an_error():
    params = parameters()
    optimizer = build("adamw", groups(params), 0.01)
    steps(optimizer, params, 0, 1)
    tensors, values = pack(optimizer, dict(zip("ab", params, strict=True)))
    with raises(TrainError, where="parameters", given=("b",)):
        unpack(build("adamw", groups(params), 0.01), {"a": params[0]}, tensors, values)
    with raises(TrainError, where="groups", given=2, expected=1):
        unpack(build("adamw", groups(params)[:1], 0.01), dict(zip("ab", params, strict=True)), tensors, values)
