"""Who may import whom, read off the source; and what importing veneer must not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import veneer

SOURCE = Path(veneer.__file__).parent
ROOT = SOURCE.parent.parent
FORBIDDEN = {
    "injection": {"methods", "hosts", "functional", "training", "testing", "base_models", "benchmarks"},
    "methods": {"hosts", "formats", "training", "testing", "base_models", "benchmarks"},
    "hosts": {"methods", "functional", "formats", "training", "testing", "base_models", "benchmarks"},
    "functional": {"injection", "methods", "hosts", "formats", "training", "testing", "base_models"},
    "formats": {"hosts", "methods", "training", "testing", "base_models", "benchmarks"},
    "training": {"hosts", "testing", "benchmarks", "classification", "control"},
    "classification": {"hosts", "testing", "control"},
    "control": {"hosts", "methods", "testing", "classification"},
    "testing": {"hosts", "methods"},
    "base_models": {"hosts", "methods", "testing"},
}
"""Part of the project -> parts that it must not import, beside `TOP`."""
TOP = {"cli", "commands", "pipelines", "apps"}
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


@pytest.mark.parametrize("part", FORBIDDEN)
def test_parts_import_in_one_direction(part: str) -> None:
    wrong = []
    for path, package in files(SOURCE / part, f"veneer.{part}"):
        for line, name in imported(path, package):
            if name.split(".")[0] == "veneer" and name.split(".")[1:2] and name.split(".")[1] in FORBIDDEN[part] | TOP:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_injection_knows_torch_and_nothing_else() -> None:
    known = {*sys.stdlib_module_names, "torch", "veneer"}
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
    command_line = {"cli.py", "commands.py", "testing/matrix.py"}
    printing = []
    for path in sorted(SOURCE.rglob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            printing.append(str(path.relative_to(SOURCE)))
    assert sorted(printing) == sorted(command_line)
