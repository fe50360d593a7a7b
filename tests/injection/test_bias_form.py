"""Adapters that change weight and bias together: y = W' x + b', where b' may depend on W."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.injection.toy import Net, ToyHost, net, run, stir
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach, hosts
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import NormSite, WeightSite
from veneer.testing.snapshot import assert_same, snapshot

PLACES = "attn.q attn.out conv head norm"


class Both(Adapter):
    """W' = (1 + a) W, b' = b + a·Σ over a row of W + c: a bias that depends on W."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.c = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(width))

    def weight(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.a)

    def bias(self, bias: Tensor, weight: Any) -> Tensor:
        return bias + self.a * weight().reshape(len(bias), -1).sum(1) + self.c


@dataclass(frozen=True)
class BothMethod(Method):
    name: ClassVar[str] = "both"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"kind": ("linear", "conv")}), Need(NormSite))
    default: ClassVar[tuple[str, ...]] = tuple(PLACES.split())

    def build(self, site: Any) -> Adapter:
        return Both(site.d_out if isinstance(site, WeightSite) else site.width)


def both(model: nn.Module, where: str = PLACES, **options: Any) -> Any:
    tuned = attach(model, BothMethod(), where=where, **options)
    stir(tuned)
    return tuned


def expected_tensors(model: Net, *order: Any) -> dict[str, Tensor]:
    """All tensors in double precision, with the attachments applied in this order at their scales."""
    tensors = {name: p.detach().double().clone() for name, p in net().named_parameters()}
    for tuned in order:
        for site, adapter in tuned.parts.values():
            name, rows = f"{site.path}.{site.param}", slice(*site.rows) if site.rows else slice(None)
            before = tensors[name][rows].clone()
            if tuned.method.name == "lora":
                tensors[name][rows] += tuned.scale * (adapter.up.double() @ adapter.down.double()).detach().view_as(before)
                continue
            a, c = adapter.a.item(), adapter.c.detach().double()
            tensors[name][rows] += tuned.scale * a * before
            tensors[site.bias][rows] += tuned.scale * (a * before.flatten(1).sum(1) if before.ndim > 1 else a * before)
            tensors[site.bias][rows] += tuned.scale * c
    return tensors


def assert_output_of(model: Net, tensors: dict[str, Tensor]) -> None:
    """Asserts that the model's output equals that of the bare model with these tensors."""
    explicit = net().double()
    explicit.load_state_dict({**explicit.state_dict(), **tensors})
    torch.testing.assert_close(run(model).double(), run(explicit), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_attached_and_merged_outputs_equal_the_explicit_formula(scale: float) -> None:
    model = net()
    tuned = both(model)
    tuned.scale = scale
    expected = expected_tensors(model, tuned)
    assert_output_of(model, expected)
    report = tuned.merge()
    assert report.tensors == 10
    assert_output_of(model, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=0, atol=1e-6, msg=name)


def test_unmerge_disable_and_detach_are_bitwise() -> None:
    model = net()
    before, output = snapshot(model), run(model)
    tuned = both(model)
    adapted = run(model)
    assert not torch.equal(adapted, output)
    tuned.merge()
    tuned.unmerge()
    assert torch.equal(run(model), adapted)
    tuned.scale = 0.0
    assert torch.equal(run(model), output)
    tuned.detach()
    assert torch.equal(run(model), output)
    assert_same(before, snapshot(model), "detach()")


@pytest.mark.parametrize("names", [("both", "lora"), ("lora", "both"), ("both", "both")])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_adapter_gets_the_weight_with_the_changes_of_earlier_ones(names: tuple[str, str], reverse: bool) -> None:
    """They are applied in the order of attaching; merged ones in the order of merging."""
    model, where = net(), "attn.q attn.out head"
    order = []
    for i, name in enumerate(names):
        if name == "both":
            order.append(both(model, where, name=f"both{i}"))
        else:
            order.append(attach(model, "lora", where="attn.out", rank=2, name=f"lora{i}"))
            stir(order[-1])
    assert_output_of(model, expected_tensors(model, *order))
    merged = order[::-1] if reverse else order
    for tuned in merged:
        tuned.merge()
        rest = [t for t in order if not t.merged]
        assert_output_of(model, expected_tensors(model, *[t for t in merged if t.merged], *rest))
    for tuned in reversed(merged):
        tuned.unmerge()
    assert_output_of(model, expected_tensors(model, *order))


CALLED = [
    ("ssf", {}),
    ("repadapter", {"dropout": 0.0}),
    ("lora", {"rank": 2}),
    ("ia3", {"inputs": "head"}),
    ("ia3", {}),
    ("dora", {"rank": 2}),
]


@pytest.mark.parametrize("second", range(len(CALLED)))
@pytest.mark.parametrize("first", range(len(CALLED)))
def test_called_layers_act_in_the_order_of_attaching(first: int, second: int) -> None:
    """Outputs do not change when they are merged in that order, whether an adapter changes x, y or both."""
    model = net().double()
    order = []
    for i, number in enumerate((first, second, 1)):
        name, options = CALLED[number]
        order.append(attach(model, name, where="head", name=f"{name}{i}", **options))
        stir(order[-1], 0.2)
    adapted = run(model)
    for tuned in order:
        tuned.merge()
        torch.testing.assert_close(run(model), adapted, rtol=1e-9, atol=1e-9)
    for tuned in reversed(order):
        tuned.unmerge()
    assert torch.equal(run(model), adapted)


def test_gradients_through_weight_and_bias() -> None:
    model = net()
    tuned = both(model, "attn.out")
    inputs = ToyHost().sample(model)
    model(**inputs).square().sum().backward()
    (_, adapter) = tuned.parts["read"]
    explicit, a = net(), adapter.a.detach().clone().requires_grad_()
    c = adapter.c.detach().clone().requires_grad_()
    weight, bias = explicit.read.weight.detach(), explicit.read.bias.detach()
    changed = {"read.weight": weight * (1 + a), "read.bias": bias + a * weight.sum(1) + c}
    torch.func.functional_call(explicit, changed, (), inputs).square().sum().backward()
    torch.testing.assert_close(adapter.a.grad, a.grad)
    torch.testing.assert_close(adapter.c.grad, c.grad)


def test_a_copy_is_independent() -> None:
    model = net()
    tuned = both(model)
    twin, adapted = copy.deepcopy(model), run(model)
    assert torch.equal(run(twin), adapted)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(1.0)
        model.read.parametrizations.weight.original.mul_(2)
    assert torch.equal(run(twin), adapted)
    tuned.scale = 0.0
    assert torch.equal(run(twin), adapted)


def test_a_cast_attachment_can_be_disabled() -> None:
    model = net()
    tuned = both(model)
    adapted = run(model)
    model.double()
    torch.testing.assert_close(run(model), adapted.double(), rtol=0, atol=1e-5)
    tuned.scale = 0.0
    assert torch.equal(run(model), run(net().double()))
    tuned.scale = 1.0
    assert not torch.equal(run(model), run(net().double()))


def test_the_hosts_state_dict_is_as_before_and_each_tensor_is_saved_once() -> None:
    model, bare = net(), net().state_dict()
    tuned = both(model)
    assert list(tuned.host_state_dict()) == list(bare)
    assert all(torch.equal(t, bare[name]) for name, t in tuned.host_state_dict().items())
    names = [f"{site}:{p}" for site in tuned.parts for p in ("a", "c")]
    assert list(tuned.state_dict()) == names == [name for name, _ in tuned.named_parameters()]
    assert not [key for key in model.state_dict() if "adapters" in key or key.endswith((".a", ".c"))]
    shifted = {id(p) for p in model.parameters() if p.requires_grad}
    assert shifted == {id(p) for p in tuned.parameters()}


def test_a_layer_without_a_bias_is_refused_by_name_and_nothing_changes() -> None:
    """BEiT reads its fused weight, and has biases for queries and values only."""
    torch.manual_seed(0)
    model = hosts.get("timm_vit")().tiny()["beit"]()
    before = snapshot(model)
    with raises(UnsupportedSite, site="blocks.0.attn.k", expected="bias"):
        attach(model, BothMethod(), where="attn.{q,k,v}")
    assert_same(before, snapshot(model), "a refused attach")
    attach(model, BothMethod(), where="attn.{q,v}", sample=True).detach()
    assert_same(before, snapshot(model), "detach()")


@pytest.mark.parametrize("obstacle", ["quantized or sharded", "computed"])
def test_a_bias_that_cannot_be_merged_into_is_rejected_and_nothing_changes(obstacle: str) -> None:
    model = net()
    tuned = attach(model, "ssf", where="head")
    if obstacle == "computed":
        parametrize.register_parametrization(model.head, "bias", nn.Tanh())
    else:
        model.head.bias = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with raises(UnsupportedSite, site="head", given=obstacle):
        tuned.merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not tuned.merged
