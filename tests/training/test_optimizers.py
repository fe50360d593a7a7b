"""Optimizers by name, their learning rates, missing packages, and their state as tensors and JSON."""

import json
import sys

import pytest
import torch
from torch import nn

from tests.raising import raises
from veneer.injection.errors import MissingExtra
from veneer.training.loop.errors import TrainError
from veneer.training.loop.optimizers import OPTIMIZERS, build, pack, set_rates, unpack

OPTIONAL = [("adamw8bit", "bitsandbytes", "8bit"), ("prodigy", "prodigyopt", "prodigy")]
HERE = ("adamw", "sgd", "adafactor")


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


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("adamw8bit", "bitsandbytes", "8bit"), ("prodigy", "prodigyopt", "prodigy")]
)
def test_missing_package_names_the_extra(name, module, extra, monkeypatch):
    for key in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, key)
    monkeypatch.setitem(sys.modules, module, None)  # import fails, as without the package
    with raises(MissingExtra, where=name, given=module, expected=extra):
        build(name, groups(parameters()), 1e-3)


@pytest.mark.parametrize(("name", "module", "extra"), OPTIONAL)
def test_optional_optimizers_step_and_resume(name, module, extra):
    pytest.importorskip(module)
    resumes_bitwise(name)


def test_unknown_name_lists_the_known():
    with raises(TrainError, where="optimizer", given="adam", expected=tuple(OPTIMIZERS)):
        build("adam", groups(parameters()), 1e-3)


def test_an_empty_group_is_an_error():
    with raises(TrainError, where="text", given=0):
        build("adamw", [{"params": [], "name": "text"}], 1e-3)


@pytest.mark.parametrize("name", HERE)
def test_state_survives_tensors_and_json(name):
    resumes_bitwise(name)


def resumes_bitwise(name):
    """Six steps equal three, out through tensors and JSON, into a fresh optimizer, and three more."""
    whole = parameters()
    steps(build(name, groups(whole), 0.01), whole, 0, 6)

    first = parameters()
    optimizer = build(name, groups(first), 0.01)
    steps(optimizer, first, 0, 3)
    tensors, values = pack(optimizer, dict(zip("ab", first, strict=True)))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = build(name, groups(second), 0.01)
    unpack(optimizer, dict(zip("ab", second, strict=True)), tensors, json.loads(json.dumps(values)))
    steps(optimizer, second, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


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
