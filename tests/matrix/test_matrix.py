"""Every method on every host that fits: the whole conformance suite, generated from the registries."""

from __future__ import annotations

from veneer.injection.plan import hosts_for
from veneer.injection.registry import hosts, methods
from veneer.testing import Check, parametrize_with_checks

PAIRS = [(name, host) for name in methods.names() for host in hosts_for(methods.get(name))]


@parametrize_with_checks(PAIRS, once=["compiles_to_one_graph"])
def test_method(check: Check) -> None:
    check()


@parametrize_with_checks(hosts.names())
def test_host(check: Check) -> None:
    check()


def test_every_method_and_every_host_is_in_the_matrix() -> None:
    assert {name for name, _ in PAIRS} == set(methods.names())
    assert {host for _, host in PAIRS} == set(hosts.names())
