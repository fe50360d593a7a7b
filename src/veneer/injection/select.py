"""Selects sites by patterns.

A pattern is `[tower[.stage]/]role[@from:to]`:

    attn.{q,v}            roles, with braces and `*`; each alternative must match a site
    attn                  the role and its sub-roles: attn.q, attn.k, …
    mlp@6:12              blocks 6 to 11; `@3` one block; `@-2:` the last two
    text/attn.*           one tower; `*/attn` every tower
    unet.up/xattn.{k,v}   one stage of a tower; `unet.up.1/…` one of its levels
    name:blocks.3.*       by site name, with `*`
    module:REGEX          layers by module path, as peft's target_modules: see `injection.module_patterns`
    not:norm.qk           excludes sites, also those that other patterns match
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from .errors import SelectionError
from .module_patterns import MODULE, is_target
from .sites import NormSite, ParamSite, Site, WeightSite

NOT = "not:"
_MODULE_PATTERN = rf"((?:{NOT})?{MODULE}\S+)"
S = TypeVar("S", bound=Site)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern. Without a `tower` it selects from the main towers."""

    text: str
    tower: str | None
    stage: str | None
    roles: tuple[str, ...]
    depths: slice | None
    name: str | None = None
    module: str | None = None

    def matches(self, site: Site, main: frozenset[str], depths: int) -> bool:
        """True if the pattern matches a site.

        Args:
            main: towers that patterns without a tower select from. `depths`: number of blocks of the site's tower.
        """
        if self.name is not None:
            return fnmatchcase(site.name, self.name)
        if self.tower is None and site.tower not in main:
            return False
        if self.module is not None:
            return is_target(site, self.module)
        if self.tower is not None and not fnmatchcase(site.tower, self.tower):
            return False
        if self.stage is not None and not (site.stage == self.stage or (site.stage or "").startswith(self.stage + ".")):
            return False
        if self.depths is not None and (site.depth is None or site.depth not in range(*self.depths.indices(depths))):
            return False
        return any(self._matches_role(role, site) for role in self.roles)

    @staticmethod
    def _matches_role(role: str, site: Site) -> bool:
        if site.role == role:
            return True
        if isinstance(site, WeightSite) and site.fused:
            return False
        return fnmatchcase(site.role, role) or fnmatchcase(site.role, role + ".*")


def parse(text: str) -> Pattern:
    """Parses one pattern.

    Raises:
        SelectionError: the syntax of the pattern, of its depth range or of its regular expression is wrong.
    """
    if text.startswith("name:"):
        return Pattern(text, None, None, (), None, name=text[5:])
    if text.startswith(MODULE):
        return Pattern(text, None, None, (), None, module=text.removeprefix(MODULE))
    head, slash, rest = text.rpartition("/")
    tower, _, stage = head.partition(".")
    role, at, depths = rest.partition("@")
    if not role or (slash and not tower):
        raise SelectionError(
            f"'{text}' is not a pattern. Expected [tower[.stage]/]role[@from:to], such as 'attn.{{q,v}}@0:6' or 'text/attn'.",
            pattern=text,
        )
    depth_range = _parse_depths(text, depths) if at else None
    return Pattern(text, tower or None if slash else None, stage or None, tuple(expand(role)), depth_range)


def _parse_depths(text: str, depths: str) -> slice:
    match = re.fullmatch(r"(-?\d+)|(-?\d+)?:(-?\d+)?", depths)
    if not match:
        message = f"'{text}': '@{depths}' is not a depth range. Expected @3, @6:12, @:6 or @-2:."
        raise SelectionError(message, pattern=text, given=depths)
    if match[1] is not None:
        depth = int(match[1])
        return slice(depth, depth + 1 if depth != -1 else None)
    return slice(*(int(end) if end else None for end in (match[2], match[3])))


def expand(text: str) -> list[str]:
    """Expands braces: `a.{q,v}` to `a.q`, `a.v`; not those of a regular expression."""
    if text.removeprefix(NOT).startswith(MODULE):
        return [text]
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def has_role(pattern: str, role: str) -> bool:
    """True if a role pattern, or an alternative of its braces, matches a role or a parent of it."""
    globs = expand(pattern) if "{" in pattern else (pattern,)
    return any(fnmatchcase(role, glob) or fnmatchcase(role, glob + ".*") for glob in globs)


def patterns(where: str | Sequence[str]) -> list[str]:
    """Splits a selection into patterns: a list, or a string with patterns separated by spaces or by commas outside braces.

    A pattern `module:REGEX` ends at a space, or at the end of a list's element.
    """
    if not isinstance(where, str):
        return [p for item in where for p in patterns(item)]
    parts = re.split(_MODULE_PATTERN, where)
    plain = [re.split(r"[,\s]+(?![^{]*\})", part.strip()) for part in parts[::2]]
    return [p for others, module in itertools.zip_longest(plain, parts[1::2], fillvalue="") for p in (*others, module) if p]


def select(sites: Sequence[S], where: str | Sequence[str], main: frozenset[str], strict: bool = True) -> list[S]:
    """The sites that match any of the patterns, in the order of `sites`.

    Args:
        sites: the candidates.
        where: patterns.
        main: towers that patterns without a tower select from.
        strict: True for the selection of a user: every pattern, and every alternative of its braces, must match a site, depth
            ranges must be within the blocks, and `not:` must exclude a site that another pattern selects. False for a default,
            which need not fit the model: if it selects a fused weight and slices of it, the fused weight is used.
    Raises:
        SelectionError: an alternative matches nothing or has no effect, or two selected sites share rows of a tensor.
    """
    depths = Counter[str]()
    for site in sites:
        if site.depth is not None:
            depths[site.tower] = max(depths[site.tower], site.depth + 1)
    chosen: set[str] = set()
    excluded: dict[str, list[str]] = {}
    names = {f"name:{s.name}": s.name for s in sites}
    for text in patterns(where):
        excludes, name = text.startswith(NOT), names.get(text.removeprefix(NOT))
        for alternative in [text] if name else expand(text):  # a fast path, because files list thousands of full names
            matches = [name] if name else _match(sites, alternative, main, depths, strict)
            if excludes:
                excluded[alternative] = matches
            else:
                chosen.update(matches)
    if strict:
        _reject_useless_exclusions(excluded, chosen)
    chosen.difference_update(*excluded.values())
    result = [s for s in sites if s.name in chosen]
    if not strict:
        result = _without_slices_of_fused(result)
    _reject_overlap(result)
    return result


def alternatives(sites: Sequence[S], where: str | Sequence[str], main: frozenset[str]) -> tuple[str, ...]:
    """The patterns of a selection that have an effect, with expanded braces.

    A pattern has an effect if it matches a site, and a `not:` pattern if it matches a site that another pattern selects.
    """
    texts = [alternative for text in patterns(where) for alternative in expand(text)]
    matches = {text: select(sites, text.removeprefix(NOT), main, strict=False) for text in texts}
    chosen = {site.name for text, matching in matches.items() if not text.startswith(NOT) for site in matching}
    return tuple(text for text, matching in matches.items() if any(site.name in chosen for site in matching))


def _match(sites: Sequence[S], text: str, main: frozenset[str], depths: Mapping[str, int], strict: bool) -> list[str]:
    """Names of the sites that one pattern without braces matches."""
    pattern = parse(text.removeprefix(NOT))
    matches = [s for s in sites if pattern.matches(s, main, depths.get(s.tower, 0))]
    if pattern.module is not None:
        matches = _without_slices_of_fused(matches)
    if strict and not matches:
        raise SelectionError(
            f"where='{text}' matches no site. Available roles: {describe_roles(sites)}.",
            pattern=text,
            given=(),
            expected=tuple({s.role: None for s in sites}),
        )
    blocks = max((depths.get(s.tower, 0) for s in matches), default=0)
    ends = (pattern.depths.start, pattern.depths.stop) if pattern.depths else ()
    if strict and any(end is not None and not -blocks <= end <= blocks for end in ends):
        raise SelectionError(
            f"where='{text}': the depth range is outside the {blocks} blocks, 0 to {blocks - 1}. Use a range within them.",
            pattern=text,
            expected=blocks,
        )
    return [s.name for s in matches]


def _reject_useless_exclusions(excluded: Mapping[str, Sequence[str]], chosen: Collection[str]) -> None:
    for text, names in excluded.items():
        if chosen and not any(name in chosen for name in names):
            raise SelectionError(
                f"where='{text}' excludes nothing: it matches {names[0]}, which no other pattern selects. Remove the pattern.",
                pattern=text,
            )


def _without_slices_of_fused(sites: Sequence[S]) -> list[S]:
    """The sites without slices of fused weights that are selected as a whole."""
    fused = {(s.component, s.path, s.param) for s in sites if isinstance(s, WeightSite) and s.fused}
    return [s for s in sites if not isinstance(s, WeightSite) or s.rows is None or (s.component, s.path, s.param) not in fused]


def describe_roles(sites: Sequence[Site]) -> str:
    """Roles of the sites and their number, by tower: `unet: attn.q ×16, …`."""
    towers: dict[str, Counter[str]] = {}
    for site in sites:
        towers.setdefault(site.tower, Counter())[site.role] += 1
    return "; ".join(f"{t or 'model'}: " + ", ".join(f"{r} ×{n}" for r, n in c.items()) for t, c in towers.items()) or "none"


def _reject_overlap(sites: Sequence[Site]) -> None:
    """Raises `SelectionError` if two sites share rows of one tensor."""
    seen: dict[tuple[str, str, str], list[tuple[tuple[int, int] | None, str]]] = {}
    for site in sites:
        if not isinstance(site, (WeightSite, ParamSite, NormSite)):
            continue
        others = seen.setdefault((site.component, site.path, site.param), [])
        for rows, name in others:
            if rows is None or site.rows is None or (rows[0] < site.rows[1] and site.rows[0] < rows[1]):
                message = f"'{site.name}' and '{name}' share rows of one tensor; select one of them."
                raise SelectionError(message, given=(site.name, name))
        others.append((site.rows, site.name))
