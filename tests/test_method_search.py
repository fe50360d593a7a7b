"""Search for methods: ranking and groups by use."""

from __future__ import annotations

import pytest

from veneer.injection import methods
from veneer.method_catalog import MethodEntry, catalog
from veneer.method_search import SUGGESTIONS, USES, group_by_use, rank_methods


def found(query: str) -> list[str]:
    return [method.name for method in rank_methods(catalog(), query)]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("VPT", "vpt"), ("vpt", "vpt"), ("visual prompt", "vpt"), ("ip adapter", "ip_adapter"), ("IP-Adapter", "ip_adapter"),
        ("ipadapter", "ip_adapter"), ("lora", "lora"), ("lorra", "lora"), ("textual inversion", "textual_inversion"),
        ("control net", "controlnet"), ("(IA)3", "ia3"), ("dreambooth", "lora"), ("stable diffusion", "lora"),
        ("faces", "lora"), ("style", "lora"), ("few images", "tip_adapter"), ("depth", "controlnet"), ("biases", "bitfit"),
        ("butterfly", "boft"), ("adapter", "adapter_plus"),
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


def test_each_method_has_one_use() -> None:
    listed = [name for use in USES for name in use.methods]
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in methods.names() if methods.source(name) == "veneer"}
    assert {name for _, names in SUGGESTIONS for name in names} <= set(listed)


def test_a_method_of_another_package_has_a_group() -> None:
    foreign = MethodEntry("mine", "my-package", "my-package", "Mine.", "", "", "", "", (), ())
    *_, (use, last) = group_by_use([*catalog(), foreign])
    assert (use.title, last) == ("From other packages", [foreign])
