"""Help, completion and lists are complete and import no large package."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import veneer
from veneer import listing, static_source
from veneer.commands import COMMANDS
from veneer.discovery import find_entries
from veneer.flags import add_flags

LARGE = ("torch", "torchvision", "diffusers", "transformers", "timm", "open_clip", "gradio", "accelerate", "numpy", "PIL")
WORDS = [
    "--version",
    "",
    *COMMANDS,
    "control train",
    "control generate",
    "personalize --method pivotal",
    "transfer --method vpt+ssf",
    "transfer --method zero_shot",
]
CONFIGS = [
    ("veneer.pipelines.personalize", "PersonalizeConfig"),
    ("veneer.pipelines.transfer", "TransferConfig"),
    ("veneer.pipelines.compare", "CompareConfig"),
    ("veneer.pipelines.search", "SearchConfig"),
    ("veneer.pipelines.control", "ControlConfig"),
    ("veneer.pipelines.control", "ControlGenerateConfig"),
    ("veneer.pipelines.merge", "MergeConfig"),
    ("veneer.pipelines.pretrain_base", "PretrainConfig"),
    ("veneer.apps.server", "AppConfig"),
]


def run(code: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_version_import_no_large_package() -> None:
    """Checked after each command, so that a failure names it."""
    code = (
        "import contextlib, io, json, sys\n"
        "from veneer.cli import main\n"
        f"for words in {WORDS!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([*words.split(), *(['--help'] if words != '--version' else [])])\n"
        f"    print(json.dumps([words, [name for name in {LARGE!r} if name in sys.modules]]))\n"
    )
    assert [json.loads(line) for line in run(code).splitlines()] == [[words, []] for words in WORDS]


@pytest.mark.parametrize("kind", ["methods", "hosts"])
def test_methods_and_hosts_are_listed_without_importing_them(kind: str) -> None:
    code = (
        "import json, sys\nfrom veneer.listing import rows, support_matrix\n"
        f"print(json.dumps([[*rows({kind!r})], len(support_matrix()), [m for m in {LARGE!r} if m in sys.modules]]))"
    )
    found, length, imported = json.loads(run(code))
    assert found == [[row["name"], row["source"], row["about"]] for row in getattr(veneer, kind).table()]
    assert [tuple(row) for row in found] == [*listing.rows(kind)]
    assert length == len(listing.support_matrix())
    assert imported == []


def described(config: type, **settings: object) -> str:
    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser, config, **settings)  # type: ignore[arg-type]
    kinds = [(a.dest, a.nargs, a.choices, getattr(a.type, "__qualname__", None), type(a).__name__) for a in parser._actions]
    return f"{parser.format_help()}\n{kinds}"


@pytest.mark.parametrize(("module", "name"), CONFIGS)
def test_flags_read_statically_equal_those_of_the_imported_config(module: str, name: str) -> None:
    read, config = static_source.read_class(module, name), getattr(__import__(module, fromlist=[name]), name)
    assert read is not config
    assert described(read) == described(config)


def test_options_read_statically_equal_those_of_each_imported_method() -> None:
    entries = [entry for entry in find_entries("veneer.methods", "veneer.methods") if entry.module]
    assert entries
    for entry in entries:
        method = veneer.methods.get(entry.name)
        read = static_source.read_class(entry.module or "", method.__name__)
        assert read is not method
        assert described(read, skip=("by_site",)) == described(method, skip=("by_site",)), entry.name


def test_a_class_that_cannot_be_read_statically_is_imported() -> None:
    with pytest.raises(static_source.UnreadableError):
        static_source.read_class("veneer.injection.method", "Adapter")
    assert static_source.class_of("veneer.injection.method", "Adapter").__module__ == "veneer.injection.method"
    code = "from veneer.static_source import class_of; print(class_of('veneer.injection.method', 'Adapter').mro()[1].__module__)"
    assert run(code).startswith("torch.nn")


def test_version_is_the_installed_package_version() -> None:
    assert run("from veneer_command import console; console()", "--version") == f"veneer {version('veneer')}\n"


def test_import_of_veneer_is_lazy_and_complete() -> None:
    code = (
        "import sys, veneer; early = 'torch' in sys.modules; import veneer.methods.reparameterized.low_rank.lora\n"
        "import veneer.hosts.timm_vit\n"
        "print(early, veneer.methods.get('lora').__name__, 'timm_vit' in veneer.hosts.names())\n"
        "print({*veneer.__all__} <= {*dir(veneer)})"
    )
    assert run(code) == "False LoRA True\nTrue\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("veneer per", ["personalize"]),
        ("veneer personalize --where --rsl", ["--rslora"]),
        ("veneer personalize --method ssf --ssf.", ["--ssf.by-site"]),
        ("veneer control gen", ["generate"]),
        ("veneer merge a b --method dare", ["dare", "dare_ties"]),
        ("veneer personalize --config none.toml --opti", ["--optimizer", "--optimizer-args"]),
    ],
)
def test_shell_completion_of_commands_flags_and_values(line: str, expected: list[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete", reason="needs argcomplete")
    out = tmp_path / "words"
    settings = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    run("from veneer_command import console; console()", **settings)
    assert sorted(word.strip() for word in out.read_text().split("\x0b") if word.strip()) == expected
