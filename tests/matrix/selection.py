"""Which checks of the conformance suite the matrix runs on which small models: by axis, not the full product.

A check depends on the method's adapter, on the kind of site that it adapts, and on how the host's model is built. So each method
runs on every host, and wherever it meets a kind of site for the first time; and each model of each host runs with
`REPRESENTATIVES`, which adapt every site that any method can use.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from veneer.testing import Check
from veneer.testing.case import Case
from veneer.testing.checks_run import site_kind
from veneer.testing.suite import METHOD_AXIS
from veneer.testing.suite import REPRESENTATIVES as ON_EVERY_MODEL

EVERYWHERE = frozenset({"every_site_live", "detach_restores", "merge_equals_explicit_change"})
"""Checked on every host, at every kind of site, and on every small model with `REPRESENTATIVES`."""

OF_EVERY_SITE = "every_site_live"
"""Checked with the representatives of the suite as well, where it has no other methods: they reach biases and fused weights."""

EVERY_HOST = frozenset(
    {
        *("identity_at_start", "only_the_adapter_trains", "count_equals_built"),
        *("weight_form_equals_output_form", "merge_is_refused_without_a_weight_form"),
    }
)
"""Checked on one model of every host."""

SLOW = frozenset({"compiles_to_one_graph", "two_adapters_compose"})
"""Checks that take seconds; `test_together` pairs every method with LoRA on every host."""

SLOW_HOSTS = {True: 2, False: 1}
"""On how many hosts a check in `SLOW` runs, by whether the method is one of `REPRESENTATIVES`."""

FEW_HOSTS = 2
"""On how many hosts a method runs a check not named here; `REPRESENTATIVES` run it on every host."""

REPRESENTATIVES = frozenset(
    {
        *("lora", "full", "ssf"),  # weights that are called or read, base parameters, norms
        *("adaptformer", "adapter_plus"),  # branches, the residual stream
        *("vpt", "coop", "textual_inversion"),  # tokens, prompts, vocabularies
        *("dam_vp", "clip_adapter", "controlnet"),  # pixels, features, residuals
        *("ip_adapter", "llama_adapter"),  # cross-attention and self-attention
    }
)


def select(checks: Iterable[Check]) -> list[Check]:
    """The checks of the matrix, in order."""
    by_method: dict[str, list[Check]] = {}
    without_library = []
    for check in checks:
        (without_library if check.name == "library" else by_method.setdefault(check.method, [])).append(check)
    return without_library + [check for method, several in by_method.items() for check in _of_method(method, several)]


def _of_method(method: str, checks: list[Check]) -> Iterator[Check]:
    models = list(dict.fromkeys((c.host, c.model) for c in checks))
    seed = zlib.crc32(method.encode())
    one_each = _one_model_per_host(models, seed)
    enough = _with_every_kind_of_site(one_each, {(c.host, c.model): c for c in checks})
    hosts = [host for host, _ in one_each]
    for check in checks:
        place = check.host, check.model
        if check.name in METHOD_AXIS:
            yield check
        elif check.name in EVERYWHERE:
            if (
                place in enough
                or method in REPRESENTATIVES
                or (check.name == OF_EVERY_SITE and _is_only_of(check, ON_EVERY_MODEL))
            ):
                yield check
        elif place in one_each and (hosts.index(check.host) + seed) % len(hosts) < hosts_of(check, len(hosts)):
            yield check


def _is_only_of(check: Check, methods: frozenset[str]) -> bool:
    """Whether the suite checks only these methods on the model, beside the core of its host."""
    return check.method in methods and check.model not in case_of(check).host.core()


def hosts_of(check: Check, among: int) -> int:
    """On how many hosts a check of a method runs that supports `among` hosts."""
    representative = check.method in REPRESENTATIVES
    if check.name in SLOW:
        return min(SLOW_HOSTS[representative], among)
    return among if check.name in EVERY_HOST or representative else min(FEW_HOSTS, among)


def _one_model_per_host(models: list[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    by_host: dict[str, list[tuple[str, str]]] = {}
    for host, model in models:
        by_host.setdefault(host, []).append((host, model))
    return [several[seed % len(several)] for several in by_host.values()]


def _with_every_kind_of_site(first: list[tuple[str, str]], checks: dict[tuple[str, str], Check]) -> set[tuple[str, str]]:
    """The models in `first`, and each further one with a kind of site that those before it lack."""
    chosen: set[tuple[str, str]] = set()
    kinds: set[tuple[Any, ...]] = set()
    for place in (*first, *checks):
        of_model = {site_kind(site) for site in case_of(checks[place]).sites}
        if place in first or not of_model <= kinds:
            chosen.add(place)
            kinds |= of_model
    return chosen


def case_of(check: Check) -> Case:
    """The method, model and sites of a check."""
    body: Any = check.body
    case: Case = body.args[0]
    return case
