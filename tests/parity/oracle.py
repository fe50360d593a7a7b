"""Oracles: clones of repositories at a commit, whose files are read without a work tree, and installed packages."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.parity.sources import SOURCES


class OracleMissing(Exception):
    """A clone or a package is not here. `oracle` is its label, `where` the folder, or None for a package."""

    def __init__(self, oracle: str, where: Path | None) -> None:
        place = f"no clone with that commit at {where}" if where else "the package is not installed"
        super().__init__(f"{oracle}: {place}; set {SOURCES} to a folder of clones named OWNER+NAME, or install the package.")
        self.oracle, self.where = oracle, where


@dataclass(frozen=True)
class Repository:
    """A public repository on GitHub at a commit.

    Args:
        name: `OWNER/NAME`.
        commit: 40 hexadecimal digits.
        third_party: methods that are not by the authors of the code.
    """

    name: str
    commit: str
    third_party: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The commit."""
        return self.commit

    def kind(self, method: str) -> str:
        """What the survey calls the oracle of a method."""
        return self.name if method in self.third_party else "official code"

    def read(self, path: str) -> str:
        """Text of a file at the commit.

        Raises:
            OracleMissing: there is no clone with the commit.
        """
        folder = Path(os.environ.get(SOURCES, ".")) / self.name.replace("/", "+")
        done = subprocess.run(["git", "-C", str(folder), "show", f"{self.commit}:{path}"], capture_output=True, check=False)
        if done.returncode:
            raise OracleMissing(f"{self.name} @ {self.commit[:12]}", folder)
        return done.stdout.decode()

    def definitions(self, path: str, *names: str, replace: Mapping[str, str] | None = None, **namespace: Any) -> Any:
        """Classes, functions and assignments of a file by name, executed without the rest of the file.

        Args:
            path: file in the repository.
            names: top-level definitions, in any order; without names the whole file except its imports.
            replace: text to text, before parsing: devices and number formats.
            namespace: names that the definitions use besides torch, nn, F, math and np.
        """
        body = [
            node
            for node in ast.parse(_replace(self.read(path), replace)).body
            if (names and _names_of(node) & {*names}) or (not names and not isinstance(node, ast.Import | ast.ImportFrom))
        ]
        return _execute(ast.Module(body, []), path, namespace)

    def module(self, path: str, name: str, replace: Mapping[str, str] | None = None) -> Any:
        """A whole file with its imports as the module `name`, in `sys.modules` for files that import it."""
        module = types.ModuleType(name)
        module.__package__ = name.rpartition(".")[0]
        sys.modules[name] = module
        exec(compile(_replace(self.read(path), replace), path, "exec"), module.__dict__)
        return module


@dataclass(frozen=True)
class Package:
    """An installed package."""

    name: str
    module: str

    @property
    def version(self) -> str:
        """The installed version."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError as error:
            raise OracleMissing(self.name, None) from error

    def kind(self, method: str) -> str:
        """What the survey calls the oracle of a method."""
        return self.module


@contextlib.contextmanager
def modules(**attributes: Any) -> Iterator[None]:
    """Stand-ins for modules that are not installed: names, with `__` for the dot, to attributes."""
    names = {name.replace("__", "."): fields for name, fields in attributes.items()}
    before = {name: sys.modules.get(name) for name in names}
    for name, fields in names.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
        vars(sys.modules[name]).update(fields)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """New tensors are of float64, for code that creates them without a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def options(**fields: Any) -> types.SimpleNamespace:
    """A configuration with attributes."""
    return types.SimpleNamespace(**fields)


def _replace(text: str, replace: Mapping[str, str] | None) -> str:
    for old, new in (replace or {}).items():
        assert old in text, f"the file has no {old!r}"
        text = text.replace(old, new)
    return text


def _names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()


def _execute(tree: ast.Module, path: str, namespace: Mapping[str, Any]) -> Any:
    module = types.ModuleType(f"oracle_{path.replace('/', '_').removesuffix('.py')}")
    base = {
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "math": math,
        "np": np,
        "Tensor": torch.Tensor,
        "partial": functools.partial,
    }
    vars(module).update({**base, **namespace})
    sys.modules[module.__name__] = module  # where dataclasses look up annotations
    exec(compile(tree, path, "exec"), vars(module))
    return module
