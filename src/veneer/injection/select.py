"""From a selection in the field's words to sites.

A pattern is `[tower[.stage]/]role[@from:to]`:

    attn.{q,v}            roles, with braces and `*`; each alternative must match something
    attn                  the role and everything below it: attn.q, attn.k, …
    mlp@6:12              blocks 6 to 11; `@3` one block; `@-2:` the last two
    text/attn.*           one tower; `*/attn` every tower
    unet.up/xattn.{k,v}   one stage of a tower; `unet.up.1/…` one level of it
    name:blocks.3.*       by site name, where no role fits
    not:norm.qk           without these, whatever the other patterns mean
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
from .sites import NormSite, ParamSite, Site, WeightSite

NOT = "not:"
S = TypeVar("S", bound=Site)


@dataclass(frozen=True)
class Pattern:
    """One parsed pattern. `towers` empty means the main towers."""

    text: str
    tower: str | None
    stage: str | None
    roles: tuple[str, ...]
    depths: slice | None
    name: str | None = None

    def matches(self, site: Site, main: frozenset[str], depths: int) -> bool:
        """True if `site` is meant; `main` are the towers meant without a name, `depths` the number of blocks of its tower."""
        if self.name is not None:
            return fnmatchcase(site.name, self.name)
        if self.tower is None and site.tower not in main:
            return False
        if self.tower is not None and not fnmatchcase(site.tower, self.tower):
            return False
        if self.stage is not None and not (site.stage == self.stage or (site.stage or "").startswith(self.stage + ".")):
            return False
        if self.depths is not None and (site.depth is None or site.depth not in range(*self.depths.indices(depths))):
            return False
        return any(self._role(role, site) for role in self.roles)

    @staticmethod
    def _role(role: str, site: Site) -> bool:
        if site.role == role:
            return True
        if isinstance(site, WeightSite) and site.fused:
            return False
        return fnmatchcase(site.role, role) or fnmatchcase(site.role, role + ".*")


def parse(text: str) -> Pattern:
    """Parse one pattern.

    Raises:
        SelectionError: it is empty or its depth range is no range.
    """
    if text.startswith("name:"):
        return Pattern(text, None, None, (), None, name=text[5:])
    head, slash, rest = text.rpartition("/")
    tower, _, stage = head.partition(".")
    role, at, span = rest.partition("@")
    if not role or (slash and not tower):
        raise SelectionError(
            f"'{text}' is no pattern. Write [tower[.stage]/]role[@from:to], such as 'attn.{{q,v}}@0:6' or 'text/attn'.",
            pattern=text,
        )
    depths = _span(text, span) if at else None
    return Pattern(text, tower or None if slash else None, stage or None, tuple(expand(role)), depths)


def _span(text: str, span: str) -> slice:
    found = re.fullmatch(r"(-?\d+)|(-?\d+)?:(-?\d+)?", span)
    if not found:
        raise SelectionError(f"'{text}': '@{span}' is no depth range. Write @3, @6:12, @:6 or @-2:.", pattern=text, given=span)
    if found[1] is not None:
        one = int(found[1])
        return slice(one, one + 1 if one != -1 else None)
    return slice(*(int(g) if g else None for g in (found[2], found[3])))


def expand(text: str) -> list[str]:
    """Expand braces: `a.{q,v}` to `a.q`, `a.v`."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def has_role(pattern: str, role: str) -> bool:
    """True if a role pattern, or an alternative of its braces, matches a role or what is above it."""
    return any(
        fnmatchcase(role, one) or fnmatchcase(role, one + ".*") for one in (expand(pattern) if "{" in pattern else (pattern,))
    )


def patterns(where: str | Sequence[str]) -> list[str]:
    """Split a selection into patterns: a list, or one string with commas outside braces or spaces between patterns."""
    if not isinstance(where, str):
        return [p for item in where for p in patterns(item)]
    return [p for p in re.split(r"[,\s]+(?![^{]*\})", where.strip()) if p]


def select(sites: Sequence[S], where: str | Sequence[str], main: frozenset[str], strict: bool = True) -> list[S]:
    """The sites that any pattern means, in the order of `sites`.

    Args:
        sites: the candidates.
        where: patterns.
        main: towers meant by a pattern without a tower.
        strict: every pattern, and every alternative of its braces, must match something, a depth range must lie within the
            blocks, what `not:` excludes must be included by another pattern, and a whole and its slices are not both meant. A
            default need not know what there is: a whole that it names counts instead of its slices.
    Raises:
        SelectionError: an alternative matches nothing (with what is there) or has no effect, or two chosen sites overlap in one
            tensor.
    """
    depths = Counter[str]()
    for site in sites:
        if site.depth is not None:
            depths[site.tower] = max(depths[site.tower], site.depth + 1)
    chosen: set[str] = set()
    left_out: dict[str, list[str]] = {}
    names = {f"name:{s.name}": s.name for s in sites}
    for text in patterns(where):
        excludes, name = text.startswith(NOT), names.get(text.removeprefix(NOT))
        for one in [text] if name else expand(text):  # files name thousands of sites, each in full
            found = [name] if name else _match(sites, one, main, depths, strict)
            if excludes:
                left_out[one] = found
            else:
                chosen.update(found)
    if strict:
        _refuse_without_effect(left_out, chosen)
    chosen.difference_update(*left_out.values())
    result = [s for s in sites if s.name in chosen]
    if not strict:
        result = _without_slices_of_wholes(result)
    _refuse_overlap(result)
    return result


def alternatives(sites: Sequence[S], where: str | Sequence[str], main: frozenset[str]) -> tuple[str, ...]:
    """The patterns of a selection, without braces, that match something; `not:` where one selects what it excludes."""
    found = {one: select(sites, one.removeprefix(NOT), main, strict=False) for text in patterns(where) for one in expand(text)}
    chosen = {site.name for one, matched in found.items() if not one.startswith(NOT) for site in matched}
    return tuple(one for one, matched in found.items() if any(site.name in chosen for site in matched))


def _match(sites: Sequence[S], text: str, main: frozenset[str], depths: Mapping[str, int], strict: bool) -> list[str]:
    """Names of the sites that one pattern without braces matches."""
    pattern = parse(text.removeprefix(NOT))
    found = [s for s in sites if pattern.matches(s, main, depths.get(s.tower, 0))]
    if strict and not found:
        raise SelectionError(
            f"where='{text}' matches no site. There are: {offered(sites)}.",
            pattern=text,
            given=(),
            expected=tuple({s.role: None for s in sites}),
        )
    blocks = max((depths.get(s.tower, 0) for s in found), default=0)
    ends = (pattern.depths.start, pattern.depths.stop) if pattern.depths else ()
    if strict and any(end is not None and not -blocks <= end <= blocks for end in ends):
        raise SelectionError(
            f"where='{text}' goes beyond the {blocks} blocks there are, 0 to {blocks - 1}. Give a depth range within these.",
            pattern=text,
            expected=blocks,
        )
    return [s.name for s in found]


def _refuse_without_effect(left_out: Mapping[str, Sequence[str]], chosen: Collection[str]) -> None:
    for text, found in left_out.items():
        if chosen and not any(name in chosen for name in found):
            raise SelectionError(
                f"where='{text}' excludes nothing: it matches {found[0]}, which no other pattern selects. Leave it out.",
                pattern=text,
            )


def _without_slices_of_wholes(sites: Sequence[S]) -> list[S]:
    wholes = {(s.component, s.path, s.param) for s in sites if isinstance(s, WeightSite) and s.fused}
    return [s for s in sites if not isinstance(s, WeightSite) or s.rows is None or (s.component, s.path, s.param) not in wholes]


def offered(sites: Sequence[Site]) -> str:
    """What there is to select, short: `unet: attn.q ×16, …`."""
    towers: dict[str, Counter[str]] = {}
    for site in sites:
        towers.setdefault(site.tower, Counter())[site.role] += 1
    return "; ".join(f"{t or 'model'}: " + ", ".join(f"{r} ×{n}" for r, n in c.items()) for t, c in towers.items()) or "nothing"


def _refuse_overlap(sites: Sequence[Site]) -> None:
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
