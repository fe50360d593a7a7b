"""Which checks of the conformance suite the matrix runs on which small models: by axis, not the full product.

A check depends on the method's adapter, on the kind of site that it adapts, and on how the host's model is built. So there are
three axes: each method meets each kind of site that it can use, each host runs each check, and each small model runs the checks
of its record. `test_together` is the product: it attaches every method on every host. A method is checked at one site of each
kind, a host and a small model at every site.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from veneer.injection.host import Host
from veneer.injection.sites import Site
from veneer.testing import Check
from veneer.testing.case import Case, build_model, merges_at, sites_of
from veneer.testing.checks_run import first_of_each, site_kind
from veneer.testing.suite import METHOD_AXIS
from veneer.testing.suite import REPRESENTATIVES as ON_EVERY_MODEL

Place = tuple[str, str]
"""Names of a host and of its small model."""

EVERY_KIND = frozenset(
    {
        *("every_site_live", "merge_equals_explicit_change", "merge_is_refused_without_a_weight_form"),
        *("identity_at_start", "count_equals_built", "weight_form_equals_output_form"),
    }
)
"""Checked for a method at every kind of site; other checks on one model."""

OF_EVERY_SITE = "every_site_live"
"""Checked on every small model with all representatives: they adapt every site."""

OF_EVERY_MODEL = ("detach_restores", "merge_equals_explicit_change")
"""Checked on every small model with one representative."""

SLOW = frozenset({"compiles_to_one_graph", "two_adapters_compose"})
"""Checks that take seconds: once for each method, and with one method on each host."""

HEAVY = 100
"""Number of modules above which a small model is used for a method only if it has no other."""

LIGHT = 60
"""The same for the checks of `SLOW`, whose time grows with the number of modules."""

METHODS_OF_A_HOST = 3
"""With how many representatives each other check runs on each host."""

TRACED = frozenset({"timm_fallback", "clip_classifier"})
"""Hosts that describe some models by a trace, at each attach."""

REPRESENTATIVES = frozenset(
    {
        *("lora", "full", "ssf"),  # weights that are called or read, base parameters, norms
        *("adaptformer", "adapter_plus"),  # branches, the residual stream
        *("vpt", "coop", "textual_inversion"),  # tokens, prompts, vocabularies
        *("dam_vp", "clip_adapter", "controlnet"),  # pixels, features, residuals
        *("ip_adapter", "llama_adapter"),  # cross-attention and self-attention
    }
)


def select(checks: Sequence[Check]) -> list[Check]:
    """The checks of the matrix, in order: those of the first axis alone at one site of each kind."""
    runnable = [check for check in checks if check.name != "library"]
    everywhere = {id(check) for axis in (of_hosts, of_models) for check in axis(runnable)}
    by_kind = {id(check) for check in of_methods(runnable)} - everywhere
    everywhere |= {id(check) for check in checks if check.name == "library"}
    return [
        check if id(check) in everywhere else at_one_site_of_each_kind(check)
        for check in checks
        if id(check) in everywhere or id(check) in by_kind
    ]


def of_every_commit(checks: Sequence[Check]) -> set[str]:
    """IDs of the checks that run with every commit; the other selected ones run every night.

    Each check of each method on one model, but for compilation, which takes a second, with a method that is no representative;
    and each check on each host with one method. Nightly: further kinds of sites, further methods, and the axis of small models.
    """
    runnable = [check for check in checks if check.name != "library"]
    by_method = (
        c for c in of_methods(runnable, every_kind=False) if c.name != "compiles_to_one_graph" or c.method in REPRESENTATIVES
    )
    return {check.id for check in (*by_method, *of_hosts(runnable, 1))}


def at_one_site_of_each_kind(check: Check) -> Check:
    """The same check at fewer sites."""
    body: Any = check.body
    return dataclasses.replace(check, body=functools.partial(body.func, with_fewer_sites(case_of(check))))


def with_fewer_sites(case: Case) -> Case:
    """The case at its first site of each kind."""
    kinds = kinds_of(type(case.host), case.model)
    return first_of_each(case, lambda site: kinds[site.name])


def of_methods(checks: Iterable[Check], every_kind: bool = True) -> Iterator[Check]:
    """For each method: on one model, the checks of `EVERY_KIND` on models with every kind of site that it can use."""
    for several in _groups(checks, lambda check: check.method).values():
        cases = {place_of(check): case_of(check) for check in several}
        weights = {place: weight(case) for place, case in cases.items()}
        places = sorted(one_model_per_host(several), key=lambda place: weights[place] > HEAVY)
        kinds = {place: kinds_in(case) for place, case in cases.items()}
        on_every_kind = cover([*places, *kinds], kinds, weights)
        light = min(places, key=lambda place: max(weights[place], LIGHT))
        for check in several:
            among = on_every_kind if check.name in EVERY_KIND and every_kind else [light] if check.name in SLOW else places[:1]
            if check.name in METHOD_AXIS or place_of(check) in among:
                yield check


def of_hosts(checks: Iterable[Check], count: int = METHODS_OF_A_HOST) -> Iterator[Check]:
    """For each host: each check with several representatives in turn, each on one of its models."""
    core = [check for check in checks if check.method in REPRESENTATIVES and check.name not in METHOD_AXIS]
    places = {method: one_model_per_host(several) for method, several in _groups(core, lambda check: check.method).items()}
    on_places = (check for check in core if place_of(check) in places[check.method])
    for (host, name), several in _groups(on_places, lambda check: (check.host, check.name)).items():
        yield from turned(several, f"{host} {name}")[: 1 if name in SLOW else count]


def of_models(checks: Iterable[Check]) -> Iterator[Check]:
    """For each small model: every site with the representatives, and other checks with one of them in turn."""
    for place, several in _groups(checks, place_of).items():
        for check in with_names(several, [OF_EVERY_SITE]):
            if check.method in REPRESENTATIVES or (check.method in ON_EVERY_MODEL and not _is_core(check)):
                yield check
        for name in OF_EVERY_MODEL:
            able = [check for check in with_names(several, [name]) if check.method in REPRESENTATIVES and _applies(check)]
            yield from turned(able, f"{place} {name}")[:1]


def one_model_per_host(checks: Iterable[Check]) -> list[Place]:
    """One small model of each host of a method, the hosts in another order for another method."""
    several = [*checks]
    by_host: dict[str, list[Place]] = {}
    for place in dict.fromkeys(map(place_of, several)):
        by_host.setdefault(place[0], []).append(place)
    start = zlib.crc32(several[0].method.encode())
    places = [models[start % len(models)] for models in by_host.values()]
    first = -start % len(places)
    return [*places[first:], *places[:first]]


def cover(places: Sequence[Place], kinds: dict[Place, set[Any]], weights: dict[Place, int]) -> list[Place]:
    """The first place, and further ones until every kind of site is in one of them: most kinds per weight first."""
    chosen, rest = [places[0]], set().union(*kinds.values()) - kinds[places[0]]
    while rest:
        chosen.append(max(places, key=lambda place: len(kinds[place] & rest) / weights[place]))
        rest -= kinds[chosen[-1]]
    return chosen


def weight(case: Case) -> int:
    """Number of modules of the small model, four times for one that is traced: what a check costs."""
    modules = count_modules(type(case.host), case.model)
    return modules * 4 if case.host.name in TRACED and modules > HEAVY / 2 else modules


@functools.cache
def count_modules(host: type[Host], model: str) -> int:
    """Number of modules of a small model."""
    return sum(1 for _ in build_model(host, model).modules())


def kinds_in(case: Case) -> set[Any]:
    """The kinds of the sites of a case."""
    kinds = kinds_of(type(case.host), case.model)
    return {kinds[site.name] for site in case.sites}


@functools.cache
def kinds_of(host: type[Host], model: str) -> dict[str, Any]:
    """The kind of each site of a small model, by the site's name."""
    return {site.name: kind(site) for site in sites_of(host, model)}


def kind(site: Site) -> tuple[Any, ...]:
    """What a seam or an adapter may treat differently, and the order of dimensions, prefix tokens and patch grid."""
    present = [bool(getattr(site, name, None)) for name in ("prefix_tokens", "grid")]
    return (*site_kind(site), getattr(site, "layout", None), *present)


def turned(several: Sequence[Any], word: str) -> list[Any]:
    """The same in another order for another word: the beginning moves to the end."""
    start = zlib.crc32(word.encode()) % len(several) if several else 0
    return [*several[start:], *several[:start]]


def place_of(check: Check) -> Place:
    """The host and the small model of a check."""
    return check.host, check.model


def case_of(check: Check) -> Case:
    """The method, model and sites of a check."""
    body: Any = check.body
    case: Case = body.args[0]
    return case


def _is_core(check: Check) -> bool:
    """True if every method is checked on the model."""
    return check.model in case_of(check).host.core()


def _applies(check: Check) -> bool:
    """False if the check would be skipped: most adapters have no weight form."""
    case = case_of(check)
    return check.name != "merge_equals_explicit_change" or all(merges_at(site, case.method.build(site)) for site in case.sites)


def _groups(checks: Iterable[Check], key: Callable[[Check], Any]) -> dict[Any, list[Check]]:
    groups: dict[Any, list[Check]] = {}
    for check in checks:
        groups.setdefault(key(check), []).append(check)
    return groups


def with_names(checks: Iterable[Check], names: Collection[str]) -> list[Check]:
    """The checks that have one of these names."""
    return [check for check in checks if check.name in names]
