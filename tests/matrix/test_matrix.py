"""Every method on every compatible host: the whole conformance suite, generated from the registries."""

from __future__ import annotations

import pytest

from tests.matrix.selection import (
    EVERY_KIND,
    METHODS_OF_A_HOST,
    OF_EVERY_MODEL,
    REPRESENTATIVES,
    SLOW,
    case_of,
    kinds_in,
    of_every_commit,
    place_of,
    select,
    with_names,
)
from veneer.injection.registry import hosts, methods
from veneer.testing import Check, parametrize_with_checks
from veneer.testing.case import Case, usable_sites
from veneer.testing.checks_run import one_graph
from veneer.testing.suite import METHOD_AXIS, METHOD_CHECKS, method_checks

CHECKS = [check for name in methods.names() for check in method_checks(name)]
SELECTED = select(CHECKS)
OF_EVERY_COMMIT = of_every_commit(CHECKS)
NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize("check", [pytest.param(c, id=c.id, marks=() if c.id in OF_EVERY_COMMIT else NIGHTLY) for c in SELECTED])
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


def test_every_method_runs_every_check() -> None:
    pairs = {(check.method, check.name) for check in SELECTED if check.name != "library"}
    assert pairs == {(method, body.__name__) for method in methods.names() for body in METHOD_CHECKS}
    assert all(sum(c.method == method and c.name == name for c in SELECTED) == 1 for method, name in pairs if name in METHOD_AXIS)


def test_with_every_commit_each_check_runs_for_each_method_and_on_each_host() -> None:
    commit = [check for check in SELECTED if check.id in OF_EVERY_COMMIT]
    left = {(c.method, c.name) for c in SELECTED if c.name != "library"} - {(c.method, c.name) for c in commit}
    assert {name for _, name in left} == {"compiles_to_one_graph"}
    assert not {method for method, _ in left} & REPRESENTATIVES
    assert {(c.host, c.name) for c in SELECTED} - {(c.host, c.name) for c in commit} <= {
        (host, "library") for host in hosts.names()
    }


def test_every_check_runs_on_every_host() -> None:
    """The sites of one host are merged, saved and so on with several methods, and compiled with one."""
    for name in {body.__name__ for body in METHOD_CHECKS} - METHOD_AXIS:
        for host in hosts.names():
            least = 1 if name in SLOW else METHODS_OF_A_HOST
            assert len({c.method for c in SELECTED if (c.name, c.host) == (name, host)}) >= least, (name, host)


def test_every_site_of_every_model_that_a_method_can_use_is_adapted() -> None:
    """By a representative on the core of a host, where all methods are checked."""
    every, ran = (
        {(c.host.name, c.model, site) for c in map(case_of, with_names(among, ["every_site_live"])) for site in c.sites}
        for among in (CHECKS, SELECTED)
    )
    assert every == ran
    cases = [case_of(check) for check in with_names(CHECKS, ["every_site_live"]) if check.model in case_of(check).host.core()]
    by_any = {(c.host.name, c.model, site) for c in cases for site in c.sites}
    assert by_any == {(c.host.name, c.model, s) for c in cases if c.method.name in REPRESENTATIVES for s in c.sites}


def test_every_model_is_detached_from_and_merged_into() -> None:
    for name in OF_EVERY_MODEL:
        every, ran = ({place_of(check) for check in with_names(among, [name])} for among in (CHECKS, SELECTED))
        assert every == ran


def test_every_method_meets_every_kind_of_site_that_it_can_use() -> None:
    cases = {(check.method, place_of(check)): case_of(check) for check in CHECKS}
    every = {(key[0], kind) for key, case in cases.items() for kind in kinds_in(case)}
    for name in EVERY_KIND:
        selected = with_names(SELECTED, [name])
        assert every == {(check.method, kind) for check in selected for kind in kinds_in(case_of(check))}, name
