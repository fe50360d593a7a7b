"""The conformance suite on broken adapters: each fails its check."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.meta.adapters import BAD, Good
from tests.meta.host import LayersHost
from veneer.injection.registry import hosts
from veneer.testing import check_method
from veneer.testing.records import Skip
from veneer.testing.suite import METHOD_CHECKS, method_checks

FRAMEWORK = {
    "merge_is_refused_without_a_weight_form",
    "strict_load_names_the_site",
    "errors_name_the_site",
    "sites_stay_while_attached",
}
"""Checks of what the registry or the host does for every method, which no adapter can break by itself."""


@pytest.fixture(autouse=True, scope="module")
def _host() -> Iterator[None]:
    hosts.register(LayersHost)
    yield
    hosts.unregister("layers")


def test_a_good_adapter_passes_every_check() -> None:
    records = check_method(Good, "layers")
    assert records.failures == (), str(records)
    assert {r.check for r in records if r.outcome == "skipped"} == {"merge_is_refused_without_a_weight_form"}


@pytest.mark.parametrize("what", BAD)
def test_a_broken_adapter_fails_its_check(what: str) -> None:
    method, name = BAD[what]
    (check,) = [c for c in method_checks(method, LayersHost()) if c.name == name]
    assert check.record({}).outcome == "failed"


@pytest.mark.parametrize(
    ("what", "others"),
    [
        ("it is not identity at start", set()),
        ("its merge is off by a factor two", {"merge_equals_explicit_change"}),
        ("it leaks state between batch rows", {"weight_form_equals_output_form", "merge_equals_explicit_change"}),
        ("it leaves a hook behind", {"attach_is_atomic", "two_adapters_compose", "unmerge_is_bitwise"}),
    ],
)
def test_a_broken_adapter_passes_the_checks_that_it_does_not_break(what: str, others: set[str]) -> None:
    method, name = BAD[what]
    records = [check.record({}) for check in method_checks(method, LayersHost()) if check.name != "compiles_to_one_graph"]
    assert {r.check for r in records if r.outcome == "failed"} >= {name}
    assert {r.check for r in records if r.outcome == "failed"} - {name} - others == set()


def test_every_check_can_fail() -> None:
    assert {name for _, name in BAD.values()} == {check.__name__ for check in METHOD_CHECKS} - FRAMEWORK


def test_a_skip_is_what_pytest_skips() -> None:
    with pytest.raises(pytest.skip.Exception if issubclass(Skip, pytest.skip.Exception) else Skip):
        raise Skip("nothing to look at")
