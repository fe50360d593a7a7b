"""Pages of the site that are generated: one for each method from its docstring, and the command line from its parser."""

from __future__ import annotations

import argparse
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer.cli import parser_for
from veneer.command_line.examples import EXAMPLES
from veneer.commands import COMMANDS
from veneer.hosts._diffusion_transformers import records as diffusion_transformers
from veneer.hosts._transformers_vision import records as vision_models
from veneer.injection import methods as registry
from veneer.listing import support_matrix, survey
from veneer.method_catalog import MethodEntry, Option, catalog

KINDS = {
    "reparameterized": "Reparameterized",
    "additive": "Additive",
    "prompt": "Prompt",
    "selective": "Selective",
    "hybrid": "Hybrid",
}
"""Package of a method to the heading of its group, in the order of the navigation."""
SECTION = re.compile(r"^(?P<title>[A-Z][A-Za-z ]{2,30}):(?: (?P<rest>.*))?$")
HEADINGS = {"Counts": "Trainable parameters"}
"""Section of a docstring to its heading, where they differ."""
VALUES = {"n": "int", "x": "float", "read": "key=value"}
"""Placeholder in the help of a flag to the type of its values."""
SINGLE = {"VocabularySite", "PixelSite", "FeatureSite", "PromptSite", "MultimodalPromptSite", "ResidualSite"}
"""Types of sites of which a model has one, so that options by site are of no use."""
BY_SITE = """## Options by site

`by_site` changes options at some of the sites: a role pattern, or `name:` and the name of a site, to options. Names take
precedence over role patterns, and later role patterns over earlier ones. An entry that matches none of the selected sites is an
error. This LoRA has rank 4 in the MLPs and rank 8 elsewhere:

```python
by_site = {"mlp.*": {"rank": 4, "alpha": 2}}
veneer.attach(model, "lora", rank=8, where=("attn", "mlp"), by_site=by_site)
```

```sh
veneer personalize --method lora --rank 8 --where attn mlp \\
  --by-site 'mlp.*:rank=4,alpha=2'
```

With several methods the flag has the name of one of them, such as `--lora.by-site`.
"""


def generated_pages() -> dict[str, str]:
    """Path below `docs` to the page's text."""
    methods = [method for method in catalog() if method.source == "veneer"]
    pages = {f"methods/{method.name}.md": method_page(method) for method in methods}
    pages |= {"methods/index.md": index_page(methods), "methods/SUMMARY.md": navigation(methods)}
    return {
        **pages,
        "support-matrix.md": matrix_page(),
        "survey.md": survey_page([m.name for m in methods]),
        "cli.md": command_page(),
    }


def survey_page(methods: Sequence[str]) -> str:
    """Systems of the literature over the whole width, with links to the methods and to the papers on arXiv."""
    names = "|".join(methods)
    text = re.sub(rf"`({names})`", r"[`\1`](methods/\1.md)", survey())
    linked = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return f"---\nhide: [toc, navigation]\n---\n\n{linked}\n"


def matrix_page() -> str:
    """The support matrix over the whole width, with links to the methods."""
    linked = re.sub(r"^\| `(\w+)`", r"| [`\1`](methods/\1.md)", support_matrix(), flags=re.MULTILINE)
    return f"""---
hide: [toc, navigation]
---

# Support matrix

Rows are [methods](methods/index.md), columns are hosts: families of models. The table is computed from what methods
need and hosts offer, on the small models of each host: ✓ if all of them are supported, their names if only some are,
– otherwise.

<div class="matrix" markdown>
{linked}
</div>

## Diffusion transformers

The families of `diffusers_dit`, with the parameters of their published models. Adapters attach to all of them; which of
them the commands train is on the page of [`veneer personalize`](cli.md).

{record_table(diffusion_transformers())}

## Vision models of transformers

The families of `transformers_vit`; `veneer transfer --model hf:NAME` trains them.

{record_table(vision_models())}
"""


def record_table(records: Mapping[str, Any]) -> str:
    """The families of a host: their classes, published models, and small models in the matrix."""
    lines = ["| class | published models | small models |", "|---|---|---|"]
    for record in records.values():
        sizes = ", ".join(f"{name}: {parameters:,}" for name, (_, parameters) in record.full_size.items())
        lines.append(f"| {', '.join(f'`{c}`' for c in record.classes)} | {sizes or '–'} | {', '.join(record.tiny)} |")
    return "\n".join(lines)


def method_page(method: MethodEntry) -> str:
    """The page of one method: docstring, options, supported hosts."""
    title, _, about = method.about.partition(": ")
    lines = [f"# {escaped(title)}", "", f"`{method.name}` – {escaped(about or title)}", "", escaped(method.formula), ""]
    tasks = ', tasks=("pets", "clothes")' if "tasks" in (option.name for option in method.options) else ""
    lines += ["```python", f'veneer.attach(model, "{method.name}"{tasks})', "```", ""]
    facts = {"Paper": method.paper, "Adapts": method.needs, "Conditions": ", ".join(method.conditions), "Group": method.kind}
    lines += [f"- **{name}**: {escaped(' '.join(text.split()))}" for name, text in facts.items() if text]
    lines += ["", *_options(method)]
    for heading, text in sections(method.text):
        lines += [f"## {HEADINGS.get(heading, heading)}", ""] if heading else []
        lines += [_body(heading, text), ""]
    lines += ["## Supported hosts", "", *supported_hosts(method.name), ""]
    return "\n".join(lines)


def _options(method: MethodEntry) -> Iterator[str]:
    if not method.options:
        return
    yield from (
        "## Options",
        "",
        '<div class="reference" markdown>',
        "",
        "| option | type | default | meaning |",
        "|---|---|---|---|",
    )
    for option in method.options:
        yield f"| `{option.name}` | `{_type(option)}` | `{option.default}` | {cell(option.about)} |"
    yield from ("", "</div>", "")
    config = registry.get(method.name)
    shared = config.shared_options
    if any(need.site.__name__ not in SINGLE for need in config.needs):
        alike = f", except {', '.join(f'`{name}`' for name in shared)}" if shared else ""
        yield from (f"Options can differ by site{alike}: see [Options by site](index.md#options-by-site).", "")


def _type(option: Option) -> str:
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", option.type.replace("collections.abc.", ""))
    return re.sub(r"Literal\[([^\]]*)\]", lambda literal: literal[1].replace(", ", " | "), text)


def _body(heading: str, text: str) -> str:
    """The text of a section as Markdown: indented paragraphs are Python, and errors are a list."""
    if heading == "Raises":
        return "\n".join(f"- {escaped(error)}" for error in re.split(r"\n(?=[A-Z]\w+: )", text))
    if heading not in ("", "Counts"):
        text = text[:1].upper() + text[1:]
    parts = [(part, textwrap.dedent(part)) for part in text.split("\n\n")]
    return "\n\n".join(escaped(part) if part == code else f"```python\n{code}\n```" for part, code in parts)


def sections(docstring: str) -> Iterator[tuple[str, str]]:
    """Heading and text of each part of a docstring after its first line, without `Args:`; the first heading may be empty."""
    heading, text, parts = "", list[str](), list[tuple[str, str]]()
    for line in docstring.split("\n")[1:]:
        match = SECTION.match(line)
        if match is None:
            text.append(line.strip() if heading else line)
            continue
        parts.append((heading, "\n".join(text).strip()))
        heading, text = match["title"], [match["rest"] or ""]
    parts.append((heading, "\n".join(text).strip()))
    return ((heading, text) for heading, text in parts if text and heading != "Args")


def supported_hosts(name: str) -> Iterator[str]:
    """The hosts of one row of the support matrix, as a list."""
    rows = [_cells(line) for line in support_matrix().splitlines()]
    row = next(row for row in rows if row[0] == f"`{name}`")
    for host, models in zip(rows[0][1:], row[1:], strict=True):
        if models != "–":
            yield f"- {host}" + ("" if models == "✓" else f": {models}")
    yield from ("", "See the [support matrix](../support-matrix.md).")


def _cells(row: str) -> list[str]:
    return [text.strip() for text in row.strip("|").split("|")]


def index_page(methods: Sequence[MethodEntry]) -> str:
    """All methods, in groups."""
    lines = [
        "# Methods",
        "",
        "Every method of `veneer methods`, grouped by what it changes. Each page is generated from the docstring of",
    ]
    lines += ["the method's config class.", ""]
    for kind, group in grouped(methods):
        lines += [f"## {kind}", "", "| method | what it is |", "|---|---|"]
        lines += [f"| [`{method.name}`]({method.name}.md) | {cell(method.about)} |" for method in group]
        lines.append("")
    return "\n".join([*lines, BY_SITE])


def navigation(methods: Sequence[MethodEntry]) -> str:
    """The navigation of the methods (plugin mkdocs-literate-nav)."""
    lines = ["- [All methods](index.md)"]
    for kind, group in grouped(methods):
        lines += [f"- {kind}", *(f"    - [{method.name}]({method.name}.md)" for method in group)]
    return "\n".join(lines) + "\n"


def grouped(methods: Sequence[MethodEntry]) -> Iterator[tuple[str, list[MethodEntry]]]:
    """Heading and methods of each group that has any."""
    for kind in dict.fromkeys([*KINDS, *(method.kind for method in methods)]):
        if group := [method for method in methods if method.kind == kind]:
            yield KINDS.get(kind, kind), group


def command_page() -> str:
    """The reference of the `veneer` command."""
    lines = [
        "# Command line",
        "",
        "Generated from the parser of the `veneer` command. Commands that train a method also accept the",
    ]
    lines += [
        "options of the methods named by `--method`; shown are those of the default method. The options of all methods are on",
        "[their pages](methods/index.md), and `--by-site` sets them for some of the sites.",
        "",
        '<div class="reference" markdown>',
        "",
    ]
    for name in COMMANDS:
        lines += _command([name])
    return "\n".join([*lines, "</div>", ""])


def _command(words: list[str]) -> list[str]:
    """The heading, usage and flags of one command, or those of its subcommands."""
    parser = _parser(words)
    about, *notes = (parser.description or "").split("\n\n")
    lines = [f"## veneer {' '.join(words)}", "", _sentence(about), "", *(f"{escaped(note)}\n" for note in notes)]
    if examples := EXAMPLES.get(" ".join(words)):
        lines += ["```sh", *examples, "```", ""]
    if subcommands := _subparsers(parser):
        return [*lines, *itertools.chain.from_iterable(_command([*words, name]) for name in subcommands)]
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if rows:
            title = {"positional arguments": "arguments", "options": "flags"}.get(str(group.title), group.title)
            lines += [f"| {title} | values | meaning |", "|---|---|---|", *rows, ""]
    return lines


def _sentence(phrase: str) -> str:
    return f"{escaped(phrase[:1].upper() + phrase[1:])}."


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = parser_for(words)
    for word in words:
        parser = _subparsers(parser)[word]
    return parser


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def _row(action: argparse.Action) -> str:
    flags = ", ".join(f"`{flag}`{{.flag}}" for flag in action.option_strings) or f"`{action.dest.upper()}`"
    if action.choices:
        values = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        values = ""
    else:
        kind = str(action.metavar or getattr(action.type, "__name__", "str")).lower().strip("_")
        values = f"{VALUES.get(kind, kind)}{' …' if action.nargs in ('+', '*') else ''}"
    return f"| {flags} | {values} | {cell((action.help or '').replace('%%', '%'))} |"


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """Text of a docstring as Markdown: outside of code, nothing in it is markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>#|])", r"\\\1", part) for part in parts)
