"""The page "Source files" of the site: every package and module with the first sentence of its docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FOLDERS = {"src/veneer": "veneer", "pipelines": "veneer.pipelines", "apps": "veneer.apps"}
"""Folder of the repository to its package."""
HEAD = """---
hide: [navigation]
---

# Source files

Every package with its modules and the first sentence of their docstrings. Packages and modules that begin with `_` are
shared parts of the modules beside them. [Design](design.md) explains the decisions.

<div class="source-files" markdown>
"""


def source_files_page(root: Path) -> str:
    """The page as Markdown.

    Args:
        root: folder of the repository.
    """
    lines = [HEAD]
    for folder, package in FOLDERS.items():
        for path in packages(root / folder):
            name = ".".join([package, *path.relative_to(root / folder).parts])
            about = first_sentence(path / "__init__.py")
            lines += [f"## {name}" if name.count(".") < 2 else f"### {name}", "", *([escaped(about), ""] if about else [])]
            lines += _table(path)
    return "\n".join([*lines, "</div>", ""])


def packages(folder: Path) -> Iterator[Path]:
    """A package and all packages below it, each before its own sub-packages."""
    yield folder
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            yield from packages(path)


def modules(package: Path) -> list[Path]:
    """Modules of a package, without its `__init__.py`."""
    return sorted(path for path in package.glob("*.py") if path.name != "__init__.py")


def first_sentence(module: Path) -> str:
    """First sentence of the docstring of a module, empty without one."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[\w`)\]*]\.)(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z`])", paragraph, maxsplit=1)[0]


def _table(package: Path) -> Iterator[str]:
    if paths := modules(package):
        yield from ("| module | content |", "|---|---|")
        yield from (f"| `{path.name}` | {escaped(first_sentence(path))} |" for path in paths)
        yield ""


def escaped(text: str) -> str:
    """Text of a docstring as Markdown: outside of code, nothing in it is markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>#|])", r"\\\1", part) for part in parts)
