"""The public surface, and the size of files."""

import inspect
from pathlib import Path

import pytest

import veneer

PUBLIC = ["Attachment", "activate", "attach", "attachments", "hosts", "load", "merges", "methods", "mixed", "sites"]
ATTACHMENT = [
    "after_step", "check", "detach", "enabled", "given", "groups", "host_state_dict", "load_state_dict", "merge",
    "named_parameters", "parameters", "penalty", "prepare", "probe", "report", "save", "scale", "state_dict", "swap", "unmerge",
]  # fmt: skip
ROOT = Path(veneer.__file__).parent.parent.parent


def test_public_names() -> None:
    assert sorted(veneer.__all__) == PUBLIC
    assert all(hasattr(veneer, name) for name in [*PUBLIC, "base_models", "__version__"])
    assert not hasattr(veneer, "no_such_name")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(veneer, name)
    doc = inspect.getdoc(thing if callable(thing) else type(thing)) or ""
    assert len(doc) > 40


def test_the_attachment_has_these_methods_and_each_says_what_it_does() -> None:
    public = sorted(n for n in vars(veneer.Attachment) if not n.startswith("_"))
    assert public == ATTACHMENT
    assert [n for n in public if not inspect.getdoc(getattr(veneer.Attachment, n))] == []


def test_public_functions_say_what_they_take_and_raise() -> None:
    for function in (veneer.activate, veneer.attach, veneer.load, veneer.mixed):
        doc = inspect.getdoc(function) or ""
        assert "Args:" in doc
        assert "Raises:" in doc
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                assert parameter.name in doc, f"{function.__name__}: {parameter.name}"


def test_the_registry_speaks_for_every_method() -> None:
    for name in veneer.methods.names():
        doc = inspect.getdoc(veneer.methods.get(name)) or ""
        assert "Source:" in doc, name
        assert "Counts:" in doc, name


def test_files_are_small() -> None:
    sizes = {p: len(p.read_text().splitlines()) for d in ("src", "pipelines", "apps") for p in (ROOT / d).rglob("*.py")}
    assert {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n >= 300} == {}
