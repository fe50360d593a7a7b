"""Search for methods: ranking and groups by use."""

from __future__ import annotations

import functools

import pytest

from veneer.injection import methods
from veneer.method_catalog import MethodEntry, catalog
from veneer.method_search import USES, group_by_use, rank_methods, with_use


@functools.cache
def entries() -> tuple[MethodEntry, ...]:
    """The catalog of all methods, which takes as long as several searches."""
    return tuple(catalog())


def found(query: str) -> list[str]:
    return [method.name for method in rank_methods(entries(), query)]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("VPT", "vpt"), ("vpt", "vpt"), ("visual prompt", "vpt"), ("ip adapter", "ip_adapter"), ("IP-Adapter", "ip_adapter"),
        ("ipadapter", "ip_adapter"), ("lora", "lora"), ("lorra", "lora"), ("textual inversion", "textual_inversion"),
        ("control net", "controlnet"), ("(IA)3", "ia3"), ("dreambooth", "lora"), ("stable diffusion", "lora"),
        ("faces", "lora"), ("style", "lora"), ("few images", "tip_adapter"), ("depth", "controlnet"), ("biases", "bitfit"),
        ("butterfly", "boft"), ("adapter plus", "adapter_plus"),
    ],
)  # fmt: skip
def test_best_match(query: str, first: str) -> None:
    assert found(query)[0] == first


def test_the_name_of_every_method_is_its_best_match() -> None:
    assert [found(name)[0] for name in methods.names()] == methods.names()
    assert [found(name.replace("_", " "))[0] for name in methods.names()] == methods.names()


def test_empty_query_and_no_match() -> None:
    assert found("  ") == methods.names()
    assert found("nothingofthiskind") == []
    assert found("LOW-rank weight")
    assert rank_methods([], "lora") == []


KEYS = {use.key for use in USES}


@pytest.mark.parametrize("name", [name for name in methods.names() if methods.source(name) == "veneer"])
def test_each_method_declares_its_uses(name: str) -> None:
    """In its own class, so that a subclass of another method does not inherit its uses."""
    method = methods.get(name)
    assert vars(method)["uses"]
    assert set(method.uses) <= KEYS
    assert set(vars(method).get("recommended_for", ())) <= set(method.uses)


def test_each_use_has_a_recommended_method_first() -> None:
    every = entries()
    for use in USES:
        members = with_use(every, use.key)
        assert len(members) > 1, use.key
        assert use.key in members[0].recommended_for, use.key
        first = [use.key in method.recommended_for for method in members]
        assert first == sorted(first, reverse=True), use.key


def test_a_method_is_under_its_main_use_once() -> None:
    groups = group_by_use(entries())
    assert sorted(method.name for _, members in groups for method in members) == methods.names()
    assert all(method.uses[0] == use.key for use, members in groups for method in members if use.key)
    assert "ip_adapter" in [method.name for method in with_use(entries(), "style")], "also in a second use"


def test_a_method_of_another_package_has_a_group() -> None:
    foreign = MethodEntry("mine", "my-package", "my-package", "Mine.", "", "", "", "", (), ())
    *_, (use, last) = group_by_use([*entries(), foreign])
    assert (use.title, last) == ("From other packages", [foreign])
