"""Public names of the package, and the size of files."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import veneer
from veneer import injection

OBJECTS = [
    "Attachment", "Average", "Parallel", "Stack", "activate", "attach", "attachments", "compose", "load", "load_all", "merges",
    "mixed", "sites",
]  # fmt: skip
MODULES = [
    "adapter_merging", "base_models", "classification", "control", "formats", "functional", "hosts", "injection", "methods",
    "models", "testing", "training",
]  # fmt: skip
REGISTRY = ["get", "names", "register", "source", "table", "unregister"]
ATTACHMENT = [
    "after_step", "begin_generation", "begin_pass", "check", "compare_passes", "condition", "consistency_loss", "detach",
    "enabled", "finalize", "groups", "host_state_dict", "is_selected", "load_state_dict", "materialize", "merge",
    "named_parameters", "parameters", "penalty", "prepare", "probe", "report", "require_selection", "require_task", "save",
    "scale", "select", "state_dict", "swap", "task", "tasks", "unlabeled_passes", "unmerge",
]  # fmt: skip
ROOT = Path(veneer.__file__).parent.parent.parent


def error_classes() -> dict[str, str]:
    """Public error and warning classes of the package, with the modules that define them."""
    found = {}
    for path in (ROOT / "src/veneer").rglob("*.py"):
        classes = {
            n.name: [ast.unparse(b) for b in n.bases] for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)
        }
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        found |= {name: (module, bases) for name, bases in classes.items()}
    errors = {"VeneerError", "VeneerWarning"}
    while more := {name for name, (_, bases) in found.items() if errors & {*bases}} - errors:
        errors |= more
    return {name: found[name][0] for name in errors if not name.startswith("_")}


def test_public_names_are_the_objects_the_modules_and_every_error_class() -> None:
    assert sorted(veneer.__all__) == sorted([*OBJECTS, *MODULES, *error_classes()])
    assert sorted([*veneer.__all__, "__version__"]) == dir(veneer)
    assert not hasattr(veneer, "no_such_name")


def test_error_classes_are_those_of_the_modules_that_define_them() -> None:
    for name, module in error_classes().items():
        assert getattr(veneer, name) is getattr(importlib.import_module(module), name)


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(veneer.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == sorted(veneer.__all__)


def test_methods_and_hosts_are_packages_with_the_functions_of_a_registry() -> None:
    code = (
        "import veneer, veneer.methods.reparameterized.low_rank.lora as a, veneer.hosts.timm_vit as b\n"
        "print(a.LoRA.name, b.TimmViT.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lora", "timm_vit"]
    for package, registry in ((veneer.methods, injection.methods), (veneer.hosts, injection.hosts)):
        assert inspect.ismodule(package)
        assert sorted(package.__all__) == REGISTRY
        assert package.names() == registry.names()
        assert package.get(package.names()[0]) is registry.get(package.names()[0])


@pytest.mark.parametrize("name", [*OBJECTS, *MODULES])
def test_every_public_name_is_documented(name: str) -> None:
    assert len(inspect.getdoc(getattr(veneer, name)) or "") > 40


def test_public_methods_of_the_attachment_are_documented() -> None:
    public = sorted(n for n in dir(veneer.Attachment) if not n.startswith("_"))
    assert public == ATTACHMENT
    assert [n for n in public if not inspect.getdoc(getattr(veneer.Attachment, n))] == []


def test_docstrings_of_public_functions_name_arguments_and_errors() -> None:
    for function in (veneer.activate, veneer.attach, veneer.load, veneer.load_all, veneer.mixed):
        doc = inspect.getdoc(function) or ""
        assert "Args:" in doc
        assert "Raises:" in doc
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                assert parameter.name in doc, f"{function.__name__}: {parameter.name}"


def test_docstrings_of_methods_have_source_and_counts() -> None:
    for name in veneer.methods.names():
        doc = inspect.getdoc(veneer.methods.get(name)) or ""
        assert "Source:" in doc, name
        assert "Counts:" in doc, name


def test_files_have_fewer_than_300_lines() -> None:
    sizes = {p: len(p.read_text().splitlines()) for d in ("src", "pipelines", "apps") for p in (ROOT / d).rglob("*.py")}
    assert {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n >= 300} == {}
