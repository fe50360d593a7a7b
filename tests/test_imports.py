"""Imports between the parts of the project, read from the source, and what `import veneer` must not import."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import veneer

SOURCE = Path(veneer.__file__).parent
ROOT = SOURCE.parent.parent
JOBS = {"atomic_files", "base_models", "extras", "plot_file", "formats", "hub", "injection", "models", "training"}
ALLOWED = {
    "allocator": set(),
    "atomic_files": set(),
    "plot_file": {"atomic_files"},
    "discovery": set(),
    "config_file": {"atomic_files", "extras", "injection"},
    "command_line": {"listing"},
    "flags": {"command_line"},
    "version": set(),
    "functional": set(),
    "static_source": {"discovery"},
    "hub": {"injection"},
    "injection": {"discovery"},
    "extras": {"injection"},
    "models": {"injection"},
    "hosts": {"discovery", "injection", "models"},
    "transformer_records": {"hosts"},
    "methods": {"functional", "injection"},
    "formats": {"atomic_files", "functional", "hub", "injection", "version"},
    "adapter_merging": {"extras", "formats", "functional", "injection"},
    "testing": {"base_models", "formats", "functional", "injection"},
    "attention_heads": {"plot_file", "injection"},
    "base_models": {"extras", "hub", "injection"},
    "full_size_models": {"base_models", "injection", "models"},
    "method_catalog": {"flags", "full_size_models", "injection"},
    "method_search": {"method_catalog"},
    "listing": {"discovery", "static_source", "testing", "veneer"},
    "training": {
        "adapter_merging", "atomic_files", "base_models", "config_file", "extras", "flags", "formats", "hub", "injection",
        "methods",
    },
    "classification": JOBS,
    "publishing": {*JOBS, "version"},
    "prompt_transfer": {"formats", "injection"},
    "prompt_search": {"atomic_files", "base_models", "functional", "injection", "methods", "models", "training"},
    "control": JOBS,
    "captioning": {"extras", "hub", "injection"},
    "config_conversion": {"base_models", "config_file", "injection", "training"},
    "benchmarks": {*JOBS, "testing"},
    "commands": {
        *JOBS, "classification", "command_line", "config_file", "discovery", "flags", "hosts", "methods",
        "static_source",
    },
    "cli": {"allocator", "command_line", "commands", "extras", "version"},
    "pipelines": {
        *JOBS, "adapter_merging", "attention_heads", "benchmarks", "captioning", "classification", "cli", "config_conversion",
        "config_file", "control", "flags", "methods", "prompt_search", "prompt_transfer",
        "publishing",
    },
    "apps": {
        *JOBS, "adapter_merging", "allocator", "classification", "cli", "config_file", "control", "flags", "full_size_models",
        "listing", "method_catalog", "method_search", "methods", "pipelines", "veneer",
    },
}  # fmt: skip
"""Part of the project -> the other parts that it may import, inside functions and for type checkers included.

A part is a package or a top-level module of `src/veneer`, or `pipelines` or `apps`; `veneer` is the public surface.
"""
LAZY = ("diffusers", "transformers", "timm", "open_clip", "gradio", "accelerate", "peft", "PIL")


def imported(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def files(folder: Path, package: str) -> Iterator[tuple[Path, str]]:
    """Every file with the dotted name of its package."""
    for path in sorted(folder.rglob("*.py")):
        yield path, ".".join([package, *path.relative_to(folder).parts[:-1]])


@functools.cache
def modules() -> dict[str, tuple[Path, str]]:
    """Dotted name of every module of the project -> its file and its package."""
    found = {}
    for folder, package in ((SOURCE, "veneer"), (ROOT / "apps", "veneer.apps"), (ROOT / "pipelines", "veneer.pipelines")):
        for path, parent in files(folder, package):
            found[parent if path.stem == "__init__" else f"{parent}.{path.stem}"] = path, parent
    return found


def part_of(name: str) -> str:
    """The part that a dotted name of this project belongs to."""
    inner = name.split(".")[1:2]
    return inner[0] if inner and inner[0] in ALLOWED else "veneer"


def test_every_part_has_a_row() -> None:
    assert {part_of(name) for name in modules()} == {*ALLOWED, "veneer"}
    assert {name for name, (path, _) in modules().items() if part_of(name) == "veneer"} == {"veneer"}


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_import_in_one_direction(part: str) -> None:
    wrong = []
    for module, (path, package) in modules().items():
        for line, name in imported(path, package) if part_of(module) == part else ():
            if name.split(".")[0] == "veneer" and part_of(name) not in {part, *ALLOWED[part]}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_no_import_circles() -> None:
    """Between modules, with imports inside functions and for type checkers."""
    graph: dict[str, set[str]] = {}
    for module, (path, package) in modules().items():
        names = [name for _, name in imported(path, package)]
        graph[module] = {name if name in modules() else name.rpartition(".")[0] for name in names} & modules().keys()
    TopologicalSorter(graph).prepare()  # raises CycleError, with the modules of a circle


def test_injection_knows_torch_and_nothing_else() -> None:
    known = {*sys.stdlib_module_names, "torch", "typing_extensions", "veneer"}
    for path, package in files(SOURCE / "injection", "veneer.injection"):
        for line, name in imported(path, package):
            assert name.split(".")[0] in known, f"{path.name}:{line} imports {name}"


def test_hosts_import_their_library_inside_functions_only() -> None:
    known = {*sys.stdlib_module_names, "torch", "veneer"}
    for path, _ in files(SOURCE / "hosts", "veneer.hosts"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert {n.split(".")[0] for n in names} <= known, f"{path.name}:{node.lineno}"


def test_no_method_names_a_host_or_a_model_and_no_host_a_method() -> None:
    """A method never names a model, a host never names a method: not in an import, and not in a string."""
    hosts, methods = ({p.stem for p in (SOURCE / d).rglob("*.py") if not p.stem.startswith("_")} for d in ("hosts", "methods"))
    for folder, foreign in (("methods", hosts), ("hosts", methods)):
        for path, _ in files(SOURCE / folder, ""):
            constants = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
            words = {n.value for n in constants if isinstance(n.value, str)}
            assert words & foreign == set(), path.name


@pytest.mark.parametrize("folder", ["pipelines", "apps"])
def test_pipelines_and_apps_use_public_names(folder: str) -> None:
    """No private names, no single host or method, of the registry only what `veneer.injection` gives."""
    wrong = []
    for path, package in files(ROOT / folder, f"veneer.{folder}"):
        for line, name in imported(path, package):
            parts = name.split(".")
            own = parts[:2] == ["veneer", folder]  # shared parts of its own files
            private = not own and any(p.startswith("_") and p != "__version__" for p in parts if p != "__future__")
            inner = parts[0] == "veneer" and len(parts) > 1 and parts[1] in ("hosts", "methods") and len(parts) > 2
            inside = parts[:2] == ["veneer", "injection"] and len(parts) > 3
            if private or inner or inside:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_importing_veneer_imports_torch_only() -> None:
    code = (
        "import sys, veneer; veneer.methods.names(); veneer.hosts.names(); "
        f"print([m for m in {LAZY!r} if m in sys.modules], 'veneer.base_models' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_the_library_logs_instead_of_printing() -> None:
    command_line = {"cli.py", "command_line/output.py", "command_line/registry_listing.py", "commands.py", "testing/matrix.py"}
    printing = []
    for path in sorted(SOURCE.rglob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            printing.append(str(path.relative_to(SOURCE)))
    assert sorted(printing) == sorted(command_line)
