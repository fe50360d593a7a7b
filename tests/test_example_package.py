"""A package of its own adds a method and a host: installed offline, found by its entry points, held to the suite, used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "example_package"


def _python(*arguments: str | Path, path: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in a folder of its own, as pip installs it; the source is built in a copy."""
    source, target = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, source)
    done = _python("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source)
    assert done.returncode == 0, done.stderr
    return target


def test_it_is_found_checked_trained_saved_loaded_and_merged(installed: Path, tmp_path: Path) -> None:
    done = _python("-W", "error::UserWarning", PACKAGE / "use.py", tmp_path, path=str(installed), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "used"


def test_its_own_conformance_tests_pass(installed: Path, tmp_path: Path) -> None:
    tests = shutil.copy(PACKAGE / "conformance.py", tmp_path / "test_conformance.py")
    done = _python("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", tests, path=str(installed), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def test_a_name_that_two_distributions_provide_is_refused(installed: Path, tmp_path: Path) -> None:
    info = tmp_path / "rival-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[veneer.methods]\ngain = veneer_example.gain:Gain\n")
    done = _python("-c", "import veneer; veneer.methods.names()", path=f"{installed}{os.pathsep}{tmp_path}")
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert "'gain' is provided twice" in message
    assert "veneer-example" in message
    assert "rival" in message


def test_nothing_is_left_of_it_here() -> None:
    import veneer

    assert "gain" not in veneer.methods.names()
    assert "resmlp" not in veneer.hosts.names()
