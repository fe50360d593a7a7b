"""Entry points of the suite: records, expected failures, skips, and their pytest form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.meta.adapters import Good
from tests.meta.host import LayersHost
from tests.raising import raises
from veneer.injection.errors import UnknownName, UnsupportedSite
from veneer.injection.registry import hosts, methods
from veneer.testing import Check, check_host, parametrize_with_checks
from veneer.testing.records import Skip
from veneer.testing.suite import HOST_CHECKS, METHOD_CHECKS, host_checks, method_checks

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True, scope="module")
def _host() -> Iterator[None]:
    hosts.register(LayersHost)
    yield
    hosts.unregister("layers")


def _check(what: str) -> Check:
    def body() -> None:
        if what == "skips":
            raise Skip("nothing to look at")
        if what == "fails":
            raise AssertionError("off by two")

    return Check(what, "good", "layers", "layers", body)


def test_a_record_says_what_where_and_why() -> None:
    record = _check("fails").record({})
    assert (record.outcome, record.method, record.host, record.model) == ("failed", "good", "layers", "layers")
    assert str(record) == "failed   good-layers-layers-fails: AssertionError: off by two"
    assert str(_check("skips").record({})).endswith("nothing to look at")


@pytest.mark.parametrize("key", ["fails", "good-layers-*", "*-fails"])
def test_an_expected_failure_keeps_its_reason(key: str) -> None:
    record = _check("fails").record({key: "a known flaw"})
    assert (record.outcome, record.reason) == ("expected", "a known flaw")
    assert isinstance(record.error, AssertionError)


def test_an_expected_failure_that_passes_is_a_failure() -> None:
    record = _check("passes").record({"passes": "a known flaw"})
    assert record.outcome == "failed"
    assert "passed, but a failure was expected: a known flaw" in str(record)


def test_failures_are_listed() -> None:
    records = check_host(LayersHost, expected={"ports_in_order": "this is not so"})
    assert [r.check for r in records.failures] == ["ports_in_order"]
    assert len(str(records).splitlines()) == len(HOST_CHECKS)


def test_names_classes_and_configs_are_subjects() -> None:
    ids = [[c.id for c in found] for found in (host_checks("layers"), host_checks(LayersHost), host_checks(LayersHost()))]
    assert ids[0] == ids[1] == ids[2]
    ids = [
        [c.id for c in method_checks(m, h)] for m, h in ((Good, "layers"), (Good(), LayersHost), (Good(size=2.0), LayersHost()))
    ]
    assert ids[0] == ids[1] == ids[2] == [f"good-layers-layers-{check.__name__}" for check in METHOD_CHECKS]


def test_a_host_that_does_not_fit_is_an_error() -> None:
    with raises(UnsupportedSite, method="vpt", host="layers", site="", given=None) as raised:
        method_checks("vpt", "layers")
    assert "timm_vit" in raised.value.supported_hosts
    assert "layers" not in raised.value.supported_hosts
    assert not {"layers", *raised.value.supported_hosts} - {*hosts.names()}
    with raises(UnknownName, name="loro", expected=tuple(methods.names())):
        method_checks("loro")


def test_checks_run_once_where_that_is_asked() -> None:
    mark = parametrize_with_checks(["timm_vit"], once=["sites_resolve"])
    ids = [p.id for p in mark.args[1]]
    assert [i for i in ids if "sites_resolve" in i] == ["timm_vit-vit-sites_resolve"]
    assert len([i for i in ids if "ports_in_order" in i]) == 5


def test_pytest_runs_skips_and_expects(pytester: pytest.Pytester) -> None:
    pytester.syspathinsert(Path(__file__).parents[2])
    pytester.makepyfile(
        """
        from veneer.injection.registry import hosts
        from veneer.testing import parametrize_with_checks
        from veneer.testing.suite import method_checks
        from tests.meta.adapters import BAD, Good
        from tests.meta.host import LayersHost

        if "layers" not in hosts.names():
            hosts.register(LayersHost)
        flaw = {"*-identity_at_start": "it starts elsewhere", "*-disabled_equals_host": "this is not so"}
        bad = BAD["it is not identity at start"][0]

        @parametrize_with_checks([(bad, "layers"), LayersHost], expected=flaw)
        def test_conformance(check):
            check()
        """
    )
    result = pytester.runpytest("-k", "identity_at_start or disabled or refused or host_matches", "-rA")
    result.assert_outcomes(passed=1, skipped=1, xfailed=1, failed=1)
    result.stdout.fnmatch_lines(["*XFAIL*identity_at_start* - it starts elsewhere*"])
    result.stdout.fnmatch_lines(["*FAILED*disabled_equals_host*"])
