"""Static reading of classes: fields, defaults and docstrings from source files, without importing their dependencies.

Help, completion and lists of names need only these, and importing torch takes seconds.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from veneer.discovery import Entry

PACKAGE = __name__.partition(".")[0]


class UnreadableError(Exception):
    """A name that cannot be evaluated without importing its module."""


def class_of(module: str, name: str) -> Any:
    """The result of `read_class`, or the class itself if its module is already imported or cannot be read statically."""
    if module not in sys.modules:
        with contextlib.suppress(UnreadableError):
            return read_class(module, name)
    return getattr(importlib.import_module(module), name)


def read_class(module: str, name: str) -> Any:
    """A class with the fields, defaults and docstring of a class in a module that is not imported, without its methods.

    Raises:
        UnreadableError: a base class, a default or a type needs an import other than veneer and the standard library.
    """
    try:
        return _source(module).get(name)
    except (NameError, AttributeError, TypeError) as error:
        raise UnreadableError(f"{module}.{name}") from error


def class_named(entry: Entry) -> Any:
    """The class of a registry entry, by `class_of`; None if only the registry can find it."""
    if entry.module is None:
        return None
    node = _class_node(entry)
    return node and class_of(entry.module, node.name)


def first_line(entry: Entry) -> str | None:
    """First line of the docstring of a registry entry's class; None if only the registry can find it."""
    node = _class_node(entry)
    text = node and ast.get_docstring(node)
    return text.split("\n")[0] if text else None


def _class_node(entry: Entry) -> ast.ClassDef | None:
    classes = _source(entry.module).tree.body if entry.module else ()
    return next((node for node in classes if isinstance(node, ast.ClassDef) and _has_name(node, entry.name)), None)


def _has_name(node: ast.ClassDef, name: str) -> bool:
    """True if the class body assigns this value to `name`."""
    for line in node.body:
        if isinstance(line, ast.Assign | ast.AnnAssign) and isinstance(line.value, ast.Constant) and line.value.value == name:
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            if [ast.unparse(target) for target in targets] == ["name"]:
                return True
    return False


@cache
def _source(module: str) -> _Source:
    return _Source(module)


class _Source:
    """A module whose top-level names are evaluated on demand, each together with the names that it uses."""

    def __init__(self, module: str) -> None:
        self.module, self.path = module, _path(module)
        self.tree = ast.parse(self.path.read_bytes())
        self.names: dict[str, Any] = {"__name__": module, "__file__": str(self.path)}

    @cached_property
    def statements(self) -> dict[str, ast.stmt]:
        return {name: statement for statement in self.tree.body for name in _assigned_names(statement)}

    def get(self, name: str) -> Any:
        """Evaluates a top-level name, or returns a submodule."""
        if name not in self.names:
            statement = self.statements.get(name)
            if statement is None:
                self.names[name] = _Module(f"{self.module}.{name}")
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                self.names[name] = self._import(statement, name)
            else:
                self._run(_without_methods(statement) if isinstance(statement, ast.ClassDef) else statement)
        return self.names[name]

    def _import(self, statement: ast.Import | ast.ImportFrom, name: str) -> Any:
        alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
        if isinstance(statement, ast.Import):
            return importlib.import_module(_standard(alias.name if alias.asname else name))
        package = self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]
        where = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
        if where.partition(".")[0] == PACKAGE:
            return _source(where).get(alias.name)
        return getattr(importlib.import_module(_standard(where)), alias.name)

    def _run(self, statement: ast.stmt) -> None:
        local = {n.arg for n in ast.walk(statement) if isinstance(n, ast.arg)}
        for name in {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - local:
            if name in self.statements and name not in _assigned_names(statement):
                self.get(name)
            elif not hasattr(builtins, name) and name not in self.names:
                raise UnreadableError(f"{self.module}.{name}")
        code = compile(ast.Module([statement], []), str(self.path), "exec", dont_inherit=True)
        exec(code, self.names)


class _Module(SimpleNamespace):
    """A module whose names are evaluated on first use."""

    def __init__(self, module: str) -> None:
        super().__init__(__file__=str(_path(module)), _module=module)

    def __getattr__(self, name: str) -> Any:
        return _source(self._module).get(name)


def _path(module: str) -> Path:
    """The file of a module of this package, without importing its parent packages."""
    package, _, rest = module.partition(".")
    first, *inner = rest.split(".")
    spec = importlib.util.find_spec(f"{package}.{first}".rstrip(".")) if package == PACKAGE else None
    if spec is None or spec.origin is None:
        raise UnreadableError(module)
    path = Path(spec.origin)
    for part in inner:
        path = path.parent / part
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise UnreadableError(module)
    return path


def _standard(module: str) -> str:
    if module.partition(".")[0] not in sys.stdlib_module_names:
        raise UnreadableError(module)
    return module


def _assigned_names(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement assigns."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (a.asname or a.name.partition(".")[0] for a in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        yield from (n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _without_methods(node: ast.ClassDef) -> ast.ClassDef:
    """The class definition with only its docstring and fields."""
    body: list[ast.stmt] = [
        line
        for line in node.body
        if (isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"))
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
    ]
    return ast.ClassDef(
        name=node.name, bases=node.bases, keywords=node.keywords, decorator_list=node.decorator_list, body=body or [ast.Pass()],
        **({"type_params": []} if sys.version_info >= (3, 12) else {}),
        lineno=node.lineno, col_offset=node.col_offset, end_lineno=node.end_lineno, end_col_offset=node.end_col_offset,
    )  # fmt: skip
