"""The project's own files agree: versions, packages, data, continuous integration, commands."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import veneer
from veneer.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"veneer": ROOT / "src" / "veneer", "veneer.pipelines": ROOT / "pipelines", "veneer.apps": ROOT / "apps"}
"""Package to its folder, for those that setuptools is told of; the rest lie below them."""
PIPELINES = sorted(p.stem for p in (ROOT / "pipelines").glob("*.py") if not p.stem.startswith("_"))
MODULES = {"control_benchmark", "few_photos", "memory_benchmark", "quantization_benchmark"}
"""Pipelines without a command, run as `python -m veneer.pipelines.NAME`: they make the tables of `docs/results`."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    read: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return read


def packages_on_disk() -> dict[str, Path]:
    """Every folder with Python files, by its dotted name."""
    found = {}
    for name, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            found[".".join([name, *file.parent.relative_to(folder).parts])] = file.parent
    return found


def test_versions_agree(project: dict[str, Any]) -> None:
    newest = re.search(r"^## \[?(\d[^\]\s]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert cited is not None
    assert {project["project"]["version"], version("veneer"), newest[1], cited[1]} == {veneer.__version__}


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(packages_on_disk())
    assert project["tool"]["setuptools"]["package-dir"] == {
        "": "src",
        **{k: str(p.relative_to(ROOT)) for k, p in SOURCES.items()},
    }
    assert [f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]] == [p.name for p in (ROOT / "src").glob("*.py")]


def test_every_package_has_an_init() -> None:
    assert not [name for name, folder in packages_on_disk().items() if not (folder / "__init__.py").is_file()]


def test_every_data_file_is_packaged(project: dict[str, Any]) -> None:
    folders, patterns = packages_on_disk(), project["tool"]["setuptools"]["package-data"]
    packaged = {file for name, globs in patterns.items() for pattern in globs for file in folders[name].glob(pattern)}
    files = [p for source in SOURCES.values() for p in source.rglob("*")]
    data = [p for p in files if p.is_file() and p.suffix not in (".py", ".pyc") and not p.name.startswith(".")]
    assert SOURCES["veneer"] / "py.typed" in data
    assert not [str(p.relative_to(ROOT)) for p in data if p not in packaged]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_installed_and_has_its_command(name: str) -> None:
    spec = importlib.util.find_spec(f"veneer.pipelines.{name}")
    assert spec is not None
    assert Path(spec.origin or "").name == f"{name}.py"
    assert (
        name in MODULES or name.removesuffix("_file").replace("_", "-") in COMMANDS
    )  # a script inspect.py would hide the standard library's


def test_continuous_integration_calls_make_test(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$PWD: $*"\ntest "$1" = lint || exit 7\n')
    make.chmod(0o755)
    for name in ("chromium", "npm"):  # what it installs before, in this checkout
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    ran = subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ran.stdout == f"{ROOT}: lint\n{ROOT}: test\n"
    assert ran.returncode == 7


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "installs", "runs"),
    [
        ("demo", "'.[all]'", "veneer personalize"),
        ("test", "'.[test]'", "-m pytest"),
        ("lint", "'.[lint]'", "ruff check"),
        ("docs", "'.[docs]'", "mkdocs build --strict"),
    ],
)
def test_make_installs_what_it_runs(target: str, installs: str, runs: str, tmp_path: Path) -> None:
    """On a machine without the environment, the commands that make would run make one first."""
    command = ["make", "--dry-run", target, f"VENV={tmp_path / 'venv'}"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"-m venv .*{re.escape(installs)}.*{re.escape(runs)}", planned, re.DOTALL)
