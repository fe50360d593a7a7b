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
    """Stands in for the distribution in `EntryPoint.dist`."""

    def __init__(self, name: str) -> None:
        self.name = name


def registry_with(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str, str]) -> Registry[Method]:
    """A method registry with entry points of other distributions: (distribution, name, class)."""
    entries = []
    for distribution, name, value in points:
        point = EntryPoint(name, value, "veneer.methods")
        vars(point).update(dist=Distribution(distribution))
        entries.append(point)
    monkeypatch.setattr("veneer.discovery.entry_points", lambda group: entries)
    return Registry(Method, "veneer.methods", "veneer.methods")


def test_modules_are_registered_by_their_file_names() -> None:
    package = Path(veneer.__file__).parent
    for registry, folder in ((methods, "methods"), (hosts, "hosts")):
        paths = [f.relative_to(package) for f in (package / folder).rglob("*.py")]
        files = {path.stem for path in paths if not any(part.startswith("_") for part in path.parts)}
        assert files == set(registry.names()) - {"toy"}
        for name in files:
            assert registry.get(name).name == name
            assert registry.source(name) == "veneer"


def test_another_distribution_adds_a_name_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, ("veneer-extra", "add", f"{Add.__module__}:Add"))
    assert "add" in registry.names()
    assert registry.get("add") is Add
    assert registry.source("add") == "veneer-extra"


def test_the_error_for_a_name_of_two_distributions_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, ("left", "add", "a:A"), ("right", "add", "b:B"))
    with raises(VeneerError, where="add", given=("left", "right")):
        registry.names()
    registry = registry_with(monkeypatch, ("thief", "lora", "a:A"))
    with raises(VeneerError, where="lora", given=("veneer", "thief")):
        registry.get("lora")


def test_an_entry_point_must_load_a_method_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_with(monkeypatch, ("wrong", "plus", f"{Add.__module__}:Add"), ("other", "net", f"{Net.__module__}:Net"))
    for name, given in (("plus", Add), ("net", Net)):
        with raises(VeneerError, where=name, given=given, expected=Method):
            registry.get(name)


def test_unknown_names_suggest_close_ones() -> None:
    names = tuple(methods.names())
    with raises(UnknownName, name="lorra", kind="method", expected=names) as caught:
        methods.get("lorra")
    assert caught.value.close[0] == "lora"
    with raises(UnknownName, name="xyzzy", close=(), expected=names):
        methods.get("xyzzy")


def test_unregister_and_taken_names() -> None:
    registry = Registry(Method, "veneer.methods", "veneer.methods")
    assert registry.register(Add) is Add
    assert registry.get("add") is Add
    with raises(VeneerError, where="add", given="register()"):
        registry.register(Add)
    registry.unregister("add")
    assert "add" not in registry.names()
    with raises(VeneerError, where="toy", given="register()"):
        hosts.register(ToyHost)
    with raises(VeneerError, given=Net, expected=Method):
        registry.register(Net)  # type: ignore[arg-type]


def test_listing_names_imports_nothing() -> None:
    code = (
        "import sys, veneer; veneer.methods.names(); "
        "modules = [m for m, module in sys.modules.items() if not hasattr(module, '__path__')]; "
        "print([m for m in modules if m.startswith('veneer.methods.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_table_has_a_row_and_a_sentence_for_each_name() -> None:
    rows = {row["name"]: row for row in methods.table()}
    assert list(rows) == methods.names()
    assert all(row["about"] and row["paper"] and row["source"] for row in rows.values())


def test_two_hosts_for_one_model_are_refused() -> None:
    class OtherHost(ToyHost):
        name = "rival"

    assert isinstance(host_of(Net()), ToyHost)
    assert host_of(nn.Linear(1, 1)) is None
    hosts.register(OtherHost)
    try:
        with raises(VeneerError, where="Net", given=("rival", "toy")):
            host_of(Net())
    finally:
        hosts.unregister("rival")
