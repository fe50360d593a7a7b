"""User-visible text uses the terms of PyTorch, diffusers, timm and peft, in American spelling."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from veneer.cli import parser_for
from veneer.commands import COMMANDS

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
    r"(trained|train|[\d,]+|million|thousand) (numbers|values)": "parameters",
    r"asleep|awake": "disabled, enabled",
    r"doors?": "forward pass, root module, entry point",
    r"rooms?(?! for)": "padding, spare rank",
    r"shipped": "bundled",
    r"told|nothing (else )?said": "by default, with defaults",
    r"no more|of (its|their) own|in the place of|that which|(?<!there )(is|are) (?-i:none)": "a shorter phrase",
    r"goes on|go on|went on": "continues",
    r"colours?|coloured|grey(?!scale)|behaviours?|centre[ds]?|licen[c]es?|catalogues?|labelled|favour\w*": "American spelling",
    r"(optim|initial|normal|quant|recogn|personal|regular|parametr|summar|visual|organ|penal)is(e[drs]?|ers|ing|ation)": "-ize",
}
"""Left-out term, as a regular expression of whole words, to the term that replaces it."""
ALLOWED = {
    "the head has no classes of its own": "an error text of the run that the page records",
    "no picture": "the seed of a dropout",
    "SVG drawing": "what such a file is",
    "Draw some lines": "the user draws",
    "picture: side of the shrunken image": "the option of ilm_vp that saved files have",
}
"""Phrase with a left-out term to the reason why it stays."""
CAPTIONS = {
    "src/veneer/base_models/pretraining/data/captions.py",
    "src/veneer/base_models/pretraining/data/mixture.py",
    "src/veneer/base_models/pretraining/data/photo_words.py",
    "src/veneer/methods/prompt/class_prompts/_templates.py",
    "src/veneer/testing/tokenizers.py",
    "src/veneer/training/data/captions.py",
}
"""Modules whose strings are captions and keys of training data, not messages."""
SUBCOMMANDS = ("control train", "control generate")
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


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def help_texts(command: str) -> str:
    """Description and help of all flags of a command."""
    parser = parser_for(command.split())
    for word in command.split():
        parser = _subparsers(parser)[word]
    subcommands = [action.help for group in parser._actions for action in getattr(group, "_choices_actions", ())]
    texts = [parser.description, *subcommands, *(action.help for action in parser._actions)]
    return "\n".join(re.sub(r"`[^`\n]*`", " ", text or "") for text in texts)


@pytest.mark.parametrize("command", [*COMMANDS, *SUBCOMMANDS])
def test_help_names_defaults_instead_of_none(command: str) -> None:
    assert re.findall(r"\bNone\b.{,30}", help_texts(command)) == []


def texts() -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Kind, file or command, and its text, of everything that is checked."""
    modules = [*files("src/**/*.py"), *files("pipelines/*.py"), *files("apps/**/*.py")]
    yield from (("page", str(path), partial(prose, ROOT / path)) for path in [*files("*.md"), *files("docs/**/*.md")])
    yield from (("messages", str(path), partial(literals, ROOT / path)) for path in modules if str(path) not in CAPTIONS)
    yield from (("docstrings", str(path), partial(docstrings, ROOT / path)) for path in modules)
    yield from (("help", command, partial(help_texts, command)) for command in (*COMMANDS, *SUBCOMMANDS))


def files(pattern: str) -> list[Path]:
    """Files by their path in the repository."""
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


@pytest.mark.parametrize("kind", ["page", "messages", "docstrings", "help"])
def test_text_has_no_left_out_terms(kind: str) -> None:
    errors = {name: terms for each, name, text in texts() if each == kind and (terms := left_out(text()))}
    assert errors == {}


def test_left_out_terms_are_found_as_whole_words() -> None:
    assert left_out("Pictures, drawn as usual.") == ["Pictures, drawn as usual."] * 3
    assert left_out("The overdraw of a picturesque queue with room for 2, withdrawn.") == []
    assert left_out("20,170 numbers") == ["20,170 numbers"]
    assert left_out("two numbers") == []
