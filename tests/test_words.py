"""User-visible text uses the terms of PyTorch, diffusers, timm and peft, in American spelling."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer.cli import COMMANDS, parser_for

ROOT = Path(__file__).parents[1]
TERMS = {
    r"pictures?": "image",
    r"draws?|drew|drawn|drawings?": "generate, sample or initialize",
    r"teach(es|ing|er)?|taught": "train, fine-tune",
    r"learnt|unlearnt": "learned, trained",
    r"likeness(es)?": "similarity",
    r"figures": "metrics, scores",
    r"sheets?": "image grid",
    r"usual(ly)?|unusual(ly)?": "default",
    r"(trained|train|\d|million|thousand) (numbers|values)": "parameters",
    r"asleep|awake": "disabled, enabled",
    r"doors?": "forward pass, root module, entry point",
    r"shipped": "bundled",
    r"told|nothing (else )?said": "by default, with defaults",
    r"no more|of (its|their) own|in the place of|that which|is none|are none": "a shorter phrase",
    r"goes on|go on|went on": "continues",
    r"colours?|coloured|grey(?!scale)|behaviours?|centre[ds]?|licen[c]es?|catalogues?|labelled|favour\w*": "American spelling",
    r"(optim|initial|normal|quant|recogn|personal|regular|parametr|summar|visual|organ|penal)is(e|es|ed|er|ers|ing|ation)": "-ize",
}
"""Left-out term, as a regular expression of whole words, to the term that replaces it."""
ALLOWED: dict[str, str] = {}
"""Phrase with a left-out term to the reason why it stays."""
NOT_YET: dict[str, str] = {}
"""File or command with left-out terms to the reason. Strict: a clean one must leave the list."""
WORDS = re.compile(r"(?<![\w-])(" + "|".join(f"(?:{term})" for term in TERMS) + r")(?![\w-])", re.IGNORECASE)


def left_out(text: str) -> list[str]:
    """Left-out terms of a text, each with the text around it."""
    for phrase in ALLOWED:
        text = text.replace(phrase, "")
    text = " ".join(text.split())
    return [text[max(0, match.start() - 40) : match.end() + 40] for match in WORDS.finditer(text)]


def prose(page: Path) -> str:
    """Text of a Markdown page without code and addresses of links."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)", " ", text)


def literals(module: Path) -> str:
    """String literals of a module that are sentences or labels, with f-strings as one text; without docstrings."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    hidden = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            hidden |= {id(part) for part in node.values}
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden:
            found.append(node.value)
    return "\n".join(text for text in found if " " in text.strip() or text[:1].isupper())


def docstrings(module: Path) -> str:
    """Docstrings of a module and its public classes and functions, without code."""
    return re.sub(r"`[^`\n]*`", " ", "\n".join(_docstrings(ast.parse(module.read_text(encoding="utf-8")))))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    for child in node.body if not isinstance(node, ast.FunctionDef) else ():
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from _docstrings(child)


def files(pattern: str) -> list[object]:
    """Files of the repository, with those of `NOT_YET` as strict expected failures."""
    paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
    return [_param(path) for path in paths]


def _param(name: str) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=NOT_YET[name])] if name in NOT_YET else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("page", [*files("*.md"), *files("docs/**/*.md")])
def test_pages(page: str) -> None:
    assert left_out(prose(ROOT / page)) == []


@pytest.mark.parametrize("module", files("apps/**/*.py"))
def test_labels_of_the_app(module: str) -> None:
    assert left_out(literals(ROOT / module)) == []


@pytest.mark.parametrize("module", [*files("src/**/*.py"), *files("pipelines/*.py"), *files("apps/**/*.py")])
def test_docstrings(module: str) -> None:
    assert left_out(docstrings(ROOT / module)) == []


@pytest.mark.parametrize("command", [_param(name) for name in COMMANDS])
def test_help_of_commands(command: str) -> None:
    words = [command]
    assert left_out(parser_for(words).format_help()) == []
