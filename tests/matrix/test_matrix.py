"""Every method on every compatible host: the whole conformance suite, generated from the registries."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from veneer.injection.registry import hosts, methods
from veneer.testing import Check, parametrize_with_checks
from veneer.testing.case import Case, usable_sites
from veneer.testing.checks_run import one_graph
from veneer.testing.suite import METHOD_AXIS, METHOD_CHECKS

EVERYWHERE = {"every_site_live", "detach_restores", "merge_equals_explicit_change"}
"""What is asked on every small model of every host; the other checks on one of each host, another one for each method."""

COMPILED = "compiles_to_one_graph"
"""A check that takes seconds: each method on up to `COMPILED_HOSTS` hosts, others for another method."""
COMPILED_HOSTS = 3


def _with_few_compiled(mark: Any) -> Any:
    """The marked checks, with those named `COMPILED` on some of each method's hosts."""
    kept, places = [], dict[str, int]()
    for param in mark.args[1]:
        check = param.values[0]
        if check.name == COMPILED:
            place = places[check.method] = places.get(check.method, -1) + 1
            count = sum(1 for p in mark.args[1] if (p.values[0].method, p.values[0].name) == (check.method, COMPILED))
            if (place + zlib.crc32(check.method.encode())) % count >= COMPILED_HOSTS:
                continue
        kept.append(param)
    return pytest.mark.parametrize("check", kept)


METHODS = _with_few_compiled(
    parametrize_with_checks(methods.names(), once=[c.__name__ for c in METHOD_CHECKS if c.__name__ not in EVERYWHERE])
)


@METHODS
def test_method(check: Check) -> None:
    check()


@parametrize_with_checks(hosts.names())
def test_host(check: Check) -> None:
    check()


def test_a_unet_adapted_everywhere_is_one_graph() -> None:
    """`compiles_to_one_graph` for a model with many sites."""
    host = hosts.get("diffusers_unet")()
    config, other = methods.get("lora").examples()
    sites = usable_sites(config, host, "sd1")
    assert len(sites) > 50
    one_graph(Case(config, host, "sd1", sites, other))


def test_every_method_and_every_host_is_in_the_matrix() -> None:
    checks = [param.values[0] for param in METHODS.args[1]]
    assert {check.method for check in checks} == set(methods.names())
    assert {check.host for check in checks} == set(hosts.names())
    pairs = {(check.method, check.host) for check in checks}
    for method, host in pairs:
        names = {c.name for c in checks if (c.method, c.host) == (method, host)}
        assert names | METHOD_AXIS | {COMPILED} == {c.__name__ for c in METHOD_CHECKS}
    for method in methods.names():
        assert sorted(c.name for c in checks if c.method == method and c.name in METHOD_AXIS) == sorted(METHOD_AXIS)
        compiled = [c.host for c in checks if (c.method, c.name) == (method, COMPILED)]
        assert len(compiled) == min(COMPILED_HOSTS, sum(m == method for m, _ in pairs))
    assert {c.host for c in checks if c.name == COMPILED} == set(hosts.names())
