"""Every method on every compatible host: the whole conformance suite, generated from the registries."""

from __future__ import annotations

import pytest

from tests.matrix.selection import EVERYWHERE, REPRESENTATIVES, SLOW, case_of, hosts_of, select
from veneer.injection.registry import hosts, methods
from veneer.testing import Check, parametrize_with_checks
from veneer.testing.case import Case, usable_sites
from veneer.testing.checks_run import one_graph, site_kind
from veneer.testing.suite import METHOD_AXIS, METHOD_CHECKS, method_checks

CHECKS = [check for name in methods.names() for check in method_checks(name)]
SELECTED = select(CHECKS)


@pytest.mark.parametrize("check", [pytest.param(check, id=check.id) for check in SELECTED])
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


def test_every_check_of_a_method_runs_on_hosts_in_turn() -> None:
    pairs = {(check.method, check.host) for check in CHECKS}
    assert {method for method, _ in pairs} == {*methods.names()}
    assert {host for _, host in pairs} == {*hosts.names()}
    for method in methods.names():
        among = sum(m == method for m, _ in pairs)
        for name in (body.__name__ for body in METHOD_CHECKS):
            ran = [check for check in SELECTED if (check.method, check.name) == (method, name)]
            at = {check.host for check in ran}
            if name in METHOD_AXIS:
                assert len(ran) == 1
            elif name in EVERYWHERE:
                assert len(at) == among
            else:
                assert len(at) == len(ran) == hosts_of(ran[0], among)


def test_every_check_runs_on_every_host() -> None:
    """The sites of one host are merged, saved and so on with several methods, and compiled with one."""
    for name in {body.__name__ for body in METHOD_CHECKS} - METHOD_AXIS:
        for host in hosts.names():
            least = 1 if name in SLOW else 3
            assert len({c.method for c in SELECTED if (c.name, c.host) == (name, host)}) >= least, (name, host)


def test_every_site_of_every_model_that_a_method_can_use_is_adapted() -> None:
    """By a representative on the core of a host, where all methods are checked."""
    every, ran = (
        {(c.host.name, c.model, site) for c in map(case_of, checks) for site in c.sites}
        for checks in ([c for c in among if c.name == "every_site_live"] for among in (CHECKS, SELECTED))
    )
    assert every == ran
    cases = [c for c in map(case_of, CHECKS) if c.model in c.host.core()]
    by_any = {(c.host.name, c.model, site) for c in cases for site in c.sites}
    assert by_any == {(c.host.name, c.model, s) for c in cases if c.method.name in REPRESENTATIVES for s in c.sites}


def test_every_method_meets_every_kind_of_site_that_it_can_use() -> None:
    for name in EVERYWHERE:
        for method in methods.names():
            every, ran = (
                {site_kind(site) for check in several for site in case_of(check).sites}
                for several in ([c for c in among if (c.method, c.name) == (method, name)] for among in (CHECKS, SELECTED))
            )
            assert every == ran, method
