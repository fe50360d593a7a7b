"""The documentation site: its navigation names every page, links resolve, code blocks run, generated pages are whole."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import veneer
from tests.doc_blocks import blocks_of, commands_of, run_page
from veneer.cli import parser_for
from veneer.commands import COMMANDS
from veneer.injection import methods

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
TRAINING = ["index", "tutorials/subject", "tutorials/control", "tutorials/classification", "config-files", "export"]
RUN = [
    *(pytest.param(page, marks=pytest.mark.training) for page in TRAINING),
    "tutorials/method",
    "tutorials/host",
    "coming-from",
]
OWN = [name for name in methods.names() if methods.source(name) == "veneer"]
GENERATED = {
    "cli.md",
    "support-matrix.md",
    "survey.md",
    "source-files.md",
    "methods/index.md",
    *(f"methods/{name}.md" for name in OWN),
}
FOREIGN = {
    "train_dreambooth_lora.py": "diffusers",
    "textual_inversion.py": "diffusers",
    "train_controlnet.py": "diffusers",
    "train_t2i_adapter_sdxl.py": "diffusers",
    "networks/merge_lora.py": "sd-scripts",
    "resize_lora.py": "sd-scripts",
    "extract_lora_from_models.py": "sd-scripts",
}
"""Files that pages mention and that belong to other projects."""
FOREIGN_FLAGS = {
    "--shell": "argcomplete",
    "--cpu": "accelerate",
    "--gallery": "veneer.pipelines.few_photos",
    "--clip": "veneer.pipelines.few_photos",
    **dict.fromkeys(
        (
            "--pretrained", "--num-classes", "--opt", "--opt-eps", "--sched", "--warmup-epochs", "--lr", "--clip-grad",
            "--smoothing", "--aa", "--reprob", "--model-ema", "--model-ema-decay", "--amp", "--amp-dtype", "--grad-accum-steps",
        ),
        "timm",
    ),
}  # fmt: skip
PLACEHOLDER = re.compile(r"NAME|GROUP|<|\*|…")


@pytest.fixture(scope="module")
def scripts() -> ModuleType:
    """`docs/scripts/pages.py`."""
    return _script("pages")


@pytest.fixture(scope="module")
def sources() -> ModuleType:
    """`docs/scripts/source_files.py`."""
    return _script("source_files")


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _named(nav: Any) -> Iterator[str]:
    """Paths of a navigation of MkDocs."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _named(entry)


def test_the_navigation_names_every_page() -> None:
    yaml = pytest.importorskip("yaml")
    named = list(_named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(named) == len(set(named))
    on_disk = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(named) - {"methods/", "cli.md", "support-matrix.md", "survey.md", "source-files.md", "contributing.md"} == on_disk


def _anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent.joinpath(target).resolve() if target else ROOT / page
        if "://" in link or (file.is_relative_to(DOCS) and str(file.relative_to(DOCS)) in GENERATED and not anchor):
            continue
        if file == DOCS / "cli.md":
            found = anchor in {f"veneer-{name}" for name in COMMANDS}
        elif file == DOCS / "methods/index.md":
            found = anchor in _anchors(_script("pages").BY_SITE)
        else:
            found = file.exists() and (not anchor or anchor in _anchors(file.read_text(encoding="utf-8")))
        dead += [] if found else [link]
    assert dead == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_links_stay_inside_the_site(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).resolve().is_relative_to(DOCS)] == []


def _code(page: str) -> list[str]:
    """Inline code of a page, without its blocks."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [code for code in re.findall(r"`([^`\n]+)`", text) if not PLACEHOLDER.search(code)]


@functools.cache
def _files() -> list[str]:
    """Paths of all files from the root of the repository, with a slash before them."""
    parts = (ROOT / part for part in ("src", "pipelines", "apps", "tests", "docs"))
    return [f"/{path.relative_to(ROOT)}" for part in parts for path in part.rglob("*")]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_source_files_named_in_pages_exist(page: str) -> None:
    """A file is named by the end of its path, or by a path from the root of the repository."""
    words = [word.strip("(),") for code in _code(page) for word in code.split()]
    named = [word for word in words if word.endswith(".py") or re.match(r"(src|pipelines|apps|tests|docs)/", word)]
    missing = [word for word in named if not any(file.endswith(f"/{word.rstrip('/')}") for file in _files())]
    assert [word for word in missing if word not in FOREIGN] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_python_names_in_pages_resolve(page: str) -> None:
    named = {name for code in _code(page) for name in re.findall(r"(?:^|[ (=])(veneer(?:\.\w+)+)(?!/)", code)}
    named |= set(re.findall(r"^::: (\S+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert [name for name in sorted(named) if not name.endswith(".json") and not _resolves(name)] == []


def _resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_names_of_a_file_are_in_it(page: str) -> None:
    """Pages name them as `name` of `file.py`."""
    named = re.findall(r"`(\w+)` of `([\w/]+\.py)`", (ROOT / page).read_text(encoding="utf-8"))
    assert [(name, file) for name, file in named if name not in (ROOT / file).read_text(encoding="utf-8")] == []


def test_the_python_reference_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    public = [getattr(veneer, name) for name in veneer.__all__ if not isinstance(getattr(veneer, name), ModuleType)]
    named = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    assert [o.__name__ for o in public if not named & {o.__module__, f"{o.__module__}.{o.__name__}"}] == []


def test_identifiers_in_the_design_exist() -> None:
    sources = [path for part in ("src", "pipelines", "apps", "tests") for path in (ROOT / part).rglob("*.py")]
    known = {word for path in sources for word in re.findall(r"\w+", f"{path.as_posix()} {path.read_text(encoding='utf-8')}")}
    named = [word for code in _code("docs/design.md") for word in re.findall(r"[A-Za-z_]\w*", code, re.ASCII)]
    assert sorted({word for word in named if len(word) > 1} - known) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_blocks_in_lists_are_indented_by_four(page: str) -> None:
    """With fewer spaces MkDocs ends the list at the block."""
    assert re.findall(r"^ {1,3}```.*", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE) == []


@pytest.mark.parametrize("page", RUN)
def test_blocks_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder, with short training."""
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(DOCS / f"{page}.md")
    assert blocks
    run_page(blocks, f"{page}.md", capsys)


def test_every_tutorial_runs() -> None:
    tutorials = {f"tutorials/{path.stem}" for path in (DOCS / "tutorials").glob("*.md")}
    assert tutorials <= {page if isinstance(page, str) else page.values[0] for page in RUN}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_commands_parse(page: str) -> None:
    for kind, block in blocks_of(ROOT / page):
        for words in commands_of(block) if kind == "sh" else ():
            if "--config" not in words:  # whose file exists once the commands before have run
                parser_for(words).parse_args(words)


def test_a_docstring_is_split_into_sections(scripts: ModuleType) -> None:
    text = "y = x.\n\nMore.\n\nArgs:\n    a: one.\n    b: two.\nCounts: n: so\nmany.\nSource: B, 2024."
    assert list(scripts.sections(text)) == [("", "More."), ("Counts", "n: so\nmany."), ("Source", "B, 2024.")]


def test_code_in_docstrings_stays_code(scripts: ModuleType) -> None:
    page = scripts.generated_pages()["methods/adalora.md"]
    assert "```python\nloss = loss + tuned.penalty()\nloss.backward()\n" in page


def test_the_page_of_a_method_leads_to_options_by_site(scripts: ModuleType) -> None:
    """Except where a model has a single site, or the options must be the same at all of them."""
    pages = scripts.generated_pages()
    assert "(index.md#options-by-site)" in pages["methods/lora.md"]
    assert "differ by site, except `rank`: see" in pages["methods/vera.md"]
    assert "by-site" not in pages["methods/controlnet.md"]
    assert "--by-site 'mlp.*:rank=4,alpha=2'" in pages["methods/index.md"]


def test_sections_of_a_docstring_are_separated() -> None:
    pytest.importorskip("griffe")
    text = "Loads.\n\nArgs:\n    a: one. `b`: two. `c`: no parameter.\nRaises:\n    LoadError: bad. StateError: merged."
    expected = (
        "Loads.\n\nArgs:\n    a: one.\n    b: two. `c`: no parameter.\n\nRaises:\n    LoadError: bad.\n    StateError: merged."
    )
    separated = _script("docstring_sections").separated
    assert separated(text, ["a", "b"]) == expected
    assert separated("Attributes:\n    a, b: of both.", ["a", "b"]) == "Attributes:\n    a: of both.\n    b: of both."


def test_flags_in_sentences_are_marked() -> None:
    pytest.importorskip("mkdocs")
    html = _script("hooks").on_page_content("<p><code>a --b-c 1</code></p><pre><span></span><code>a --b\n</code></pre>")
    assert html == '<p><code>a <span class="flag">--b-c</span> 1</code></p><pre><span></span><code>a --b\n</code></pre>'


def test_paths_break_after_slashes_and_intervals_do_not_break() -> None:
    pytest.importorskip("mkdocs")
    html = _script("hooks").on_page_content(
        "<p><code>a/b --c</code> 0.5 ± 0.1, a ± b</p><pre><span></span><code>a/b</code></pre>"
    )
    paragraph = '<code>a/<wbr>b <span class="flag">--c</span></code> 0.5\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.1, a ± b'
    assert html == f"<p>{paragraph}</p><pre><span></span><code>a/b</code></pre>"


def test_text_of_docstrings_is_no_markup(scripts: ModuleType) -> None:
    assert scripts.escaped("a*b `c*d` <e>") == "a\\*b `c*d` \\<e\\>"
    assert scripts.cell("a | b") == "a \\| b"


def test_every_method_has_its_page(scripts: ModuleType) -> None:
    pages = scripts.generated_pages()
    assert {path for path in pages if path != "methods/SUMMARY.md"} == GENERATED - {"source-files.md"}
    for name in OWN:
        page, method = pages[f"methods/{name}.md"], methods.get(name)
        fields = [field.name for field in dataclasses.fields(method) if field.name != "by_site"]
        assert [field for field in fields if f"| `{field}` |" not in page] == [], name
        assert "## Source" in page, name
        assert "## Trainable parameters" in page, name
        assert "## Supported hosts" in page, name
        assert f"({name}.md)" in pages["methods/index.md"], name
        assert f"({name}.md)" in pages["methods/SUMMARY.md"], name
    assert "| `rank` | `int` | `8` |" in pages["methods/lora.md"]


def test_the_page_of_source_files_has_every_module(sources: ModuleType) -> None:
    page = sources.source_files_page(ROOT)
    for folder, package in sources.FOLDERS.items():
        for path in sources.packages(ROOT / folder):
            assert sources.first_sentence(path / "__init__.py"), path
            assert ".".join([package, *path.relative_to(ROOT / folder).parts]) in page
            for module in sources.modules(path):
                assert sources.first_sentence(module), module
                assert f"| `{module.name}` |" in page


def test_the_first_sentence_of_a_docstring_ends_at_a_full_stop(sources: ModuleType, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Loads v1.5 files, e.g. LoRA (see `a.b`). More.\n\nRest."""')
    assert sources.first_sentence(module) == "Loads v1.5 files, e.g. LoRA (see `a.b`)."
    module.write_text("x = 1")
    assert sources.first_sentence(module) == ""


def test_the_command_line_page_has_every_command_and_flag(scripts: ModuleType) -> None:
    page = scripts.command_page()
    for name in [*COMMANDS, "control train", "control generate"]:
        assert f"\n## veneer {name}\n" in page, name
    for flag in ("`--concept`", "`--no-cache`", "`--lora.rank`", "`--format`", "`--port`"):
        assert flag in page, flag


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_flags_in_pages_exist(scripts: ModuleType, page: str) -> None:
    """Flags with an underscore are of other tools; those of `python -m` commands are not checked."""
    known = set(re.findall(r"`(--[\w.-]+)`", scripts.command_page()))
    known |= _flags_of("personalize photos --method lokr+head_pruning") | _flags_of("personalize photos --method pez")
    known |= _flags_of("transfer digits --method pet") | _flags_of("transfer digits --method ppt")
    code = [code for code in _code(page) if not code.startswith("python -m")]
    named = {flag for text in code for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text) if "_" not in flag}
    assert named - known - set(FOREIGN_FLAGS) == set()


def _flags_of(line: str) -> set[str]:
    words = line.split()
    parser = parser_for(words)._subparsers
    assert parser is not None
    return set(parser._group_actions[0].choices[words[0]]._option_string_actions)  # type: ignore[index]


def test_the_example_of_a_method_for_several_tasks_names_them(scripts: ModuleType) -> None:
    pages = {method.name: scripts.method_page(method) for method in scripts.catalog()}
    assert 'veneer.attach(model, "hyperformer", tasks=("pets", "clothes"))' in pages["hyperformer"]
    assert 'veneer.attach(model, "lora")' in pages["lora"]
