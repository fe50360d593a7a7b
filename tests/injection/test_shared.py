"""Parameters that several sites share: one module per tower, trained, counted and copied once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.injection.toy import Net, ToyHost, net, run, stir
from veneer.injection import attach, attachments
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import Site, WeightSite


class ScaledAdapter(Adapter):
    applies_strength: ClassVar[bool] = True
    shared: Any

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(()))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.strength * (self.own + self.shared.bias) * self.shared.random


class Shared(nn.Module):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("random", torch.randn(6))


@dataclass(frozen=True)
class Scaled(Method):
    """Adds (a scalar of the site + a shared scalar) · a shared frozen vector."""

    name: ClassVar[str] = "scaled"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite, where={"d_out": 6}),)
    default: ClassVar[tuple[str, ...]] = ("attn.{q,k}", "embed.token")

    def build_shared(self, sites: Sequence[Site]) -> nn.Module:
        return Shared([site.name for site in sites])

    def build(self, site: WeightSite) -> ScaledAdapter:
        return ScaledAdapter()


def test_every_adapter_of_a_tower_gets_the_same_module() -> None:
    tuned = attach(net(), Scaled())
    shared = [adapter.shared for _, adapter in tuned.parts.values()]
    assert all(module is shared[0] for module in shared)
    assert shared[0].names == ["table", "qkv.q", "qkv.k"]


def test_it_is_trained_and_counted_once() -> None:
    model = net()
    tuned = attach(model, Scaled(), sample=True)
    assert [name for name, _ in tuned.named_parameters()] == ["table:own", "table:shared.bias", "qkv.q:own", "qkv.k:own"]
    assert len(tuned.groups()[0]["params"]) == 4
    report = tuned.report()
    assert (report.trainable, report.stored) == (4, 4 + 6)
    assert sum(row.trainable for row in report.rows) == 3
    model(**ToyHost().sample(model)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_the_state_dict_has_it_at_every_site_in_the_same_memory() -> None:
    tuned = attach(net(), Scaled())
    state = tuned.state_dict()
    addresses = {t.data_ptr() for k, t in state.items() if k.endswith("shared.random")}
    assert len(addresses) == 1
    other = attach(net(), Scaled())
    stir(tuned)
    other.load_state_dict(tuned.state_dict())
    assert torch.equal(other.parts["table"][1].shared.random, tuned.parts["table"][1].shared.random)


def test_it_stays_shared_when_the_model_is_copied_or_cast() -> None:
    model = net()
    output = run(model)
    stir(attach(model, Scaled()))
    twin = copy.deepcopy(model).double()
    (tuned,), (other,) = attachments(model), attachments(twin)
    shared = {id(a.shared): a.shared for _, a in other.parts.values()}
    assert len(shared) == 1
    assert next(iter(shared.values())) is not tuned.parts["table"][1].shared
    assert {t.dtype for t in other.state_dict().values()} == {torch.float64}
    assert len({t.data_ptr() for k, t in other.state_dict().items() if k.endswith("shared.random")}) == 1
    tuned.detach()
    assert torch.equal(run(model), output)


def test_on_meta_and_with_a_seed() -> None:
    with torch.device("meta"):
        model = Net()
    shared = attach(model, Scaled()).parts["table"][1].shared
    assert (shared.bias.device.type, shared.random.device.type) == ("meta", "meta")
    torch.manual_seed(3)
    first = attach(net(), Scaled()).state_dict()
    torch.manual_seed(3)
    second = attach(net(), Scaled()).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
