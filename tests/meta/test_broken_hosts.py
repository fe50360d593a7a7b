"""Hosts that describe their model wrongly: each fails its check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.meta.adapters import Good
from tests.meta.host import Layers, LayersHost
from veneer.injection.errors import VeneerError
from veneer.injection.registry import hosts
from veneer.injection.sites import BranchSite, NormSite, ParamSite, Port, Site, WeightSite
from veneer.testing import check_host
from veneer.testing.suite import HOST_CHECKS, host_checks, method_checks


def _changing(at: str, **fields: Any) -> type[LayersHost]:
    """The host with other fields at the site called `at`."""

    def sites(self: LayersHost, model: nn.Module, component: str = "", components: Any = None) -> Iterator[Site]:
        found = LayersHost.sites(self, model, component, components)
        return (dataclasses.replace(s, **fields) if s.name == at else s for s in found)

    return type("Changed", (LayersHost,), {"sites": sites})


def _adding(site: Site) -> type[LayersHost]:
    def sites(self: LayersHost, model: nn.Module, component: str = "", components: Any = None) -> Iterator[Site]:
        yield from LayersHost.sites(self, model, component, components)
        yield site

    return type("Added", (LayersHost,), {"sites": sites})


class Greedy(LayersHost):
    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, nn.Module)


class Denying(LayersHost):
    def matches(self, model: nn.Module) -> bool:
        return False


class Random(LayersHost):
    def sample(self, model: nn.Module) -> dict[str, Any]:
        return {"x": torch.randn(2, 5, 6).to(super().sample(model)["x"])}


class OneRow(LayersHost):
    def sample(self, model: nn.Module) -> dict[str, Any]:
        return {"x": super().sample(model)["x"][:1]}


class Wrapped(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(super().forward(x))


class Unreached(Layers):
    """Its read weight has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) + 0 * self.read.weight.sum()


class Contained(LayersHost):
    def matches(self, model: nn.Module) -> bool:
        return type(model) is Wrapped

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {"layers": Wrapped}

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        yield from super().sites(model, component, components)
        yield BranchSite(name="tail", role="mlp", depth=0, read=Port("into", "in"), write=Port("tail", "out"), width=6)


class Inert(LayersHost):
    def matches(self, model: nn.Module) -> bool:
        return type(model) is Unreached

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {"layers": Unreached}


class Rectifying(nn.LayerNorm):
    """A norm with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Rectified(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Rectifying(6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Normed(LayersHost):
    def matches(self, model: nn.Module) -> bool:
        return type(model) is Rectified

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {"layers": Rectified}

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        yield NormSite(name="norm", role="norm", path="norm", bias="norm.bias", width=6)
        yield from super().sites(model, component, components)


BROKEN: dict[str, tuple[type[LayersHost], str]] = {
    "it claims every model": (Greedy, "exactly_one_host_matches"),
    "it denies its own": (Denying, "exactly_one_host_matches"),
    "two sites have one name": (_changing("out", name="into"), "sites_resolve"),
    "a shape is transposed": (_changing("into", d_out=6, d_in=8), "sites_resolve"),
    "a kind is wrong": (_changing("into", kind="embedding", d_out=6, d_in=8), "sites_resolve"),
    "rows reach past the end": (_changing("into", rows=(4, 12)), "sites_resolve"),
    "a parameter is not there": (
        _adding(ParamSite(name="read.bias", role="bias.proj.out", path="read", param="bias", shape=(6,))),
        "sites_resolve",
    ),
    "a read weight is said to be called": (_changing("read", called=True), "called_is_true_by_tracing"),
    "a called weight is said to be read": (_changing("into", called=False), "called_is_true_by_tracing"),
    "a bias runs along another dimension": (_changing("out.bias", channel_dim=1), "called_bias_is_added_last"),
    "an activation follows a norm's bias": (Normed, "called_norms_end_with_weight_and_bias"),
    "a layer is said to be a norm": (
        _adding(NormSite(name="norm", role="norm", path="into", bias="into.bias", width=8)),
        "called_norms_end_with_weight_and_bias",
    ),
    "a bias that follows is not there": (_changing("read", bias="read.bias"), "sites_resolve"),
    "a branch is normed after it is written": (_changing("mlp.branch", normed=Port("", "out")), "ports_in_order"),
    "a branch is written before it is read": (
        _changing("mlp.branch", read=Port("out", "out"), write=Port("into", "in")),
        "ports_in_order",
    ),
    "a branch is read where nothing passes": (_changing("mlp.branch", read=Port("read", "in")), "ports_in_order"),
    "a branch has another width": (_changing("mlp.branch", width=8), "ports_in_order"),
    "a role is no word": (_changing("into", role="fc.first"), "roles_are_canonical"),
    "depths begin at 3": (_changing("into", depth=3), "roles_are_canonical"),
    "a branch is written at a container": (Contained, "no_container_targets"),
    "a dead weight is not said to be inert": (Inert, "inert_is_what_gradients_show"),
    "a live weight is said to be inert": (_changing("into", inert=True), "inert_is_what_gradients_show"),
    "its sample is another every time": (Random, "sample_is_a_fixed_batch_of_two"),
    "its sample has one row": (OneRow, "sample_is_a_fixed_batch_of_two"),
}


@pytest.fixture(autouse=True, scope="module")
def _host() -> Iterator[None]:
    hosts.register(LayersHost)
    yield
    hosts.unregister("layers")


def test_a_good_host_passes_every_check() -> None:
    records = check_host(LayersHost)
    assert [r.check for r in records] == [check.__name__ for check in HOST_CHECKS]
    assert {r.outcome for r in records} == {"passed"}, str(records)


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_host_fails_its_check(what: str) -> None:
    host, name = BROKEN[what]
    (check,) = [c for c in host_checks(host) if c.name == name]
    with pytest.raises((AssertionError, VeneerError)):
        check()


def test_a_dead_site_of_a_wrong_host_is_detected_by_the_method_too() -> None:
    """The layer is wrapped, but its weight is read from the wrapped module, so that the adapter has no effect."""
    hosts.unregister("layers")
    liar = hosts.register(_changing("read", called=True))
    try:
        (check,) = [c for c in method_checks(Good, liar) if c.name == "every_site_live"]
        record = check.record({})
    finally:
        hosts.unregister("layers")
        hosts.register(LayersHost)
    assert record.outcome == "failed"
    assert "read:delta" in str(record.error)


class Forgetful(LayersHost):
    """Offers a weight only while it is a parameter, which it is not while an adapter is attached."""

    def sites(self, model: nn.Module, component: str = "", components: Any = None) -> Iterator[Site]:
        found = super().sites(model, component, components)
        read: Any = model.get_submodule("read")
        return (s for s in found if s.name != "read" or isinstance(read.weight, nn.Parameter))


def test_a_host_that_loses_sites_while_attached_fails() -> None:
    hosts.unregister("layers")
    hosts.register(Forgetful)
    try:
        (check,) = [c for c in method_checks(Good, Forgetful) if c.name == "sites_stay_while_attached"]
        with pytest.raises(AssertionError, match="read"):
            check()
    finally:
        hosts.unregister("layers")
        hosts.register(LayersHost)


def test_every_check_can_fail() -> None:
    assert {name for _, name in BROKEN.values()} == {check.__name__ for check in HOST_CHECKS}


def test_sites_of_the_good_host_are_of_several_kinds() -> None:
    kinds = {type(s) for s in LayersHost().sites(Layers())}
    assert kinds == {WeightSite, ParamSite, BranchSite}
