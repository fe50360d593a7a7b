"""Every method on every host that fits: the whole conformance suite, generated from the registries."""

from __future__ import annotations

from veneer.injection.registry import hosts, methods
from veneer.testing import Check, parametrize_with_checks

METHODS = parametrize_with_checks(methods.names(), once=["compiles_to_one_graph"])


@METHODS
def test_method(check: Check) -> None:
    check()


@parametrize_with_checks(hosts.names())
def test_host(check: Check) -> None:
    check()


def test_every_method_and_every_host_is_in_the_matrix() -> None:
    checks = [param.values[0] for param in METHODS.args[1]]
    assert {check.method for check in checks} == set(methods.names())
    assert {check.host for check in checks} == set(hosts.names())
