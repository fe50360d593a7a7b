"""The page about every architecture: how many of each host, what each method took, and what was refused and why."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from tests.hosts.every_architecture import Outcome

HEAD = """# Every architecture of timm and open_clip

Every architecture that `timm.list_models()`, `open_clip.list_models()` and `open_clip.list_openai_models()` name and a host
matches was built on the meta device. On each, every registered method was attached with its default selection, counted and
detached, after which modules, parameters, buffers and hooks were the same as before. Where all sites that a method can use are
those of another architecture, name by name and shape by shape, the method was tried on one of them.

Versions: {versions}.

Made by `python -m tests.hosts.every_architecture`, in about {minutes} minutes of one busy core.
"""
SHOWN = 3  # names beside a reason


def page(found: Sequence[Outcome], waiting: Sequence[str] = ()) -> str:
    """The Markdown. `waiting`: names that were not tried yet, of a run that was stopped."""
    tried = [o for o in found if o.methods]
    minutes = max(1, round(sum(o.seconds for o in tried) / 60))
    parts = [HEAD.format(versions=_versions(), minutes=minutes), _hosts(tried), _bugs(tried), _support(tried), _refusals(tried)]
    return "\n".join([*parts, _missing(found, waiting)])


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "open_clip_torch"))


def _hosts(tried: Sequence[Outcome]) -> str:
    lines = ["| host | architectures | sites | attached | refused | pairs tried |", "|---|--:|--:|--:|--:|--:|"]
    for host in _of(tried):
        mine = [o for o in tried if o.host == host]
        results = [r for o in mine for r in o.methods.values()]
        taken, sites = sum("sites" in r for r in results), [o.sites for o in mine]
        refused = sum("refused" in r for r in results)
        span, here = f"{min(sites):,} to {max(sites):,}", sum(o.tried for o in mine)
        lines.append(f"| `{host}` | {len(mine):,} | {span} | {taken:,} | {refused:,} | {here:,} |")
    return "\n".join([*lines, ""])


def _bugs(tried: Sequence[Outcome]) -> str:
    """Errors that are not veneer's own."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for o in tried:
        for method, result in o.methods.items():
            if "bug" in result:
                groups[method, o.host, pattern(result["bug"])].append(o.name)
    if not groups:
        return "No pair ended in an error that is not one of veneer's own.\n"
    lines = ["## Errors that are bugs", "", "| method | host | error | architectures |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| `{m}` | `{h}` | {e} | {_some(who)} |" for (m, h, e), who in groups.items()), ""])


def _support(tried: Sequence[Outcome]) -> str:
    """Of how many architectures of each host a method took."""
    hosts = _of(tried)
    totals = Counter(o.host for o in tried)
    lines = [
        "## Attached",
        "",
        "Architectures that took the method with its default selection; ✓ where all did, – where none did.",
        "",
    ]
    lines += ["| method | " + " | ".join(f"`{h}` ({totals[h]:,})" for h in hosts) + " |", "|---" * (len(hosts) + 1) + "|"]
    for method in sorted({m for o in tried for m in o.methods}):
        taken = Counter(o.host for o in tried if "sites" in o.methods.get(method, {}))
        cells = ["✓" if taken[h] == totals[h] else f"{taken[h]:,}" if taken[h] else "–" for h in hosts]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _refusals(tried: Sequence[Outcome]) -> str:
    """Reasons, with names and numbers taken out, each with the methods and hosts that it was given for."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for o in tried:
        for method, result in o.methods.items():
            if "refused" in result:
                reason = pattern(result["refused"].removeprefix(f"{method}: "))
                groups[o.host, reason][method].append(o.name)
    lines = ["## Refused", "", "Numbers and names that differ from one architecture to the next are written `n` and `…`.", ""]
    lines += ["| host | reason | methods, with architectures |", "|---|---|---|"]
    for (host, reason), methods in sorted(groups.items(), key=lambda item: (item[0][0], -sum(map(len, item[1].values())))):
        lines.append(f"| `{host}` | {reason} | {_methods(methods)} |")
    return "\n".join([*lines, ""])


def _methods(methods: dict[str, list[str]]) -> str:
    """Methods that were refused on the same architectures together."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for method, who in methods.items():
        alike[tuple(who)].append(method)
    return "; ".join(", ".join(f"`{m}`" for m in same) + f": {_some(who)}" for who, same in alike.items())


def _missing(found: Sequence[Outcome], waiting: Sequence[str]) -> str:
    """What was not built or not tried, and the classes that no host matches."""
    groups: dict[str, list[str]] = defaultdict(list)
    for o in found:
        if o.skipped:
            groups[pattern(o.skipped)].append(o.name)
        elif not o.host:
            groups["no host matches its class"].append(o.name)
    if waiting:
        groups["not tried yet; the same command goes on"] = list(waiting)
    lines = ["## Left out", "", "| why | architectures |", "|---|---|"]
    return "\n".join([*lines, *(f"| {why} | {_some(who)} |" for why, who in groups.items()), ""])


def pattern(message: str) -> str:
    """A message without what differs from one architecture to the next: places, numbers, and lists behind the reason."""
    text = re.split(r"\. (?:Supported hosts|Say where)|; give (?:one )?of |; give (?:a|block_size) ", message.replace("\n", " "))[
        0
    ]
    text = re.sub(r"'[^']*\.[^']*'|(?<=at )'[^']*'|\b\w+(?:\.\w+)+(?=:)", "…", text)
    text = re.sub(r"Port\([^)]*\)", "Port(…)", text.replace("=Ellipsis", "=any"))
    text = re.sub(r"\b\d[\d,.]*\d\b|\b\d+\b", "n", text)
    return text.replace("|", "\\|").rstrip(".")


def _some(who: Iterable[str]) -> str:
    names = [name.partition("/")[2] for name in dict.fromkeys(who)]
    return f"{len(names):,} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"


def _of(tried: Sequence[Outcome]) -> list[str]:
    return sorted({o.host for o in tried})
