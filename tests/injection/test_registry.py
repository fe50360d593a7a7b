import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from torch import nn

import veneer
from tests.injection.toy import Add, Net, ToyHost
from tests.raising import raises
from veneer.injection.errors import UnknownName, VeneerError
from veneer.injection.method import Method
from veneer.injection.registry import Registry, host_of, hosts, methods


class Distribution:
    """What `EntryPoint.dist` gives, as far as the registry reads it."""

    def __init__(self, name: str) -> None:
        self.name = name


def offering(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str, str]) -> Registry[Method]:
    """A method registry beside which other distributions offer (distribution, name, class)."""
    made = []
    for distribution, name, value in points:
        point = EntryPoint(name, value, "veneer.methods")
        vars(point).update(dist=Distribution(distribution))
        made.append(point)
    monkeypatch.setattr("veneer.discovery.entry_points", lambda group: made)
    return Registry(Method, "veneer.methods", "veneer.methods")


def test_the_file_is_the_registration() -> None:
    package = Path(veneer.__file__).parent
    for found, folder in ((methods, "methods"), (hosts, "hosts")):
        files = {f.stem for f in (package / folder).rglob("*.py") if not f.stem.startswith("_")}
        assert files == set(found.names()) - {"toy"}
        for name in files:
            assert found.get(name).name == name
            assert found.source(name) == "veneer"


def test_another_distribution_adds_a_name_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    found = offering(monkeypatch, ("veneer-extra", "add", f"{Add.__module__}:Add"))
    assert "add" in found.names()
    assert found.get("add") is Add
    assert found.source("add") == "veneer-extra"


def test_two_distributions_of_one_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = offering(monkeypatch, ("left", "add", "a:A"), ("right", "add", "b:B"))
    with raises(VeneerError, where="add", given=("left", "right")):
        found.names()
    found = offering(monkeypatch, ("thief", "lora", "a:A"))
    with raises(VeneerError, where="lora", given=("veneer", "thief")):
        found.get("lora")


def test_an_entry_point_must_give_a_method_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = offering(monkeypatch, ("wrong", "plus", f"{Add.__module__}:Add"), ("other", "net", f"{Net.__module__}:Net"))
    for name, given in (("plus", Add), ("net", Net)):
        with raises(VeneerError, where=name, given=given, expected=Method):
            found.get(name)


def test_unknown_names_suggest_close_ones() -> None:
    there = tuple(methods.names())
    with raises(UnknownName, name="lorra", kind="method", expected=there) as caught:
        methods.get("lorra")
    assert caught.value.close[0] == "lora"
    with raises(UnknownName, name="xyzzy", close=(), expected=there):
        methods.get("xyzzy")


def test_register_is_undone_and_refuses_taken_names() -> None:
    found = Registry(Method, "veneer.methods", "veneer.methods")
    assert found.register(Add) is Add
    assert found.get("add") is Add
    with raises(VeneerError, where="add", given="register()"):
        found.register(Add)
    found.unregister("add")
    assert "add" not in found.names()
    with raises(VeneerError, where="toy", given="register()"):
        hosts.register(ToyHost)
    with raises(VeneerError, given=Net, expected=Method):
        found.register(Net)  # type: ignore[arg-type]


def test_names_import_nothing() -> None:
    code = (
        "import sys, veneer; veneer.methods.names(); "
        "print([m for m in sys.modules if m.startswith('veneer.methods.') and m.count('.') > 2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_table_has_a_row_and_a_sentence_for_each_name() -> None:
    rows = {row["name"]: row for row in methods.table()}
    assert list(rows) == methods.names()
    assert all(row["about"] and row["paper"] and row["source"] for row in rows.values())


def test_two_hosts_for_one_model_are_refused() -> None:
    class Rival(ToyHost):
        name = "rival"

    assert isinstance(host_of(Net()), ToyHost)
    assert host_of(nn.Linear(1, 1)) is None
    hosts.register(Rival)
    try:
        with raises(VeneerError, where="Net", given=("rival", "toy")):
            host_of(Net())
    finally:
        hosts.unregister("rival")
