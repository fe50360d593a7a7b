"""The conformance suite: `check_method` and `check_host` return records, `parametrize_with_checks` generates pytest tests."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from veneer.injection.attachment.plan import hosts_for
from veneer.injection.errors import UnknownName, UnsupportedSite
from veneer.injection.host import Host
from veneer.injection.method import Method
from veneer.injection.registry import hosts, methods

from . import checks_attach, checks_device, checks_host, checks_run, checks_state, checks_strength_merge
from .case import Case, fresh_model, usable_sites
from .records import Check, Records, Skip
from .trace import trace

METHOD_CHECKS: tuple[Callable[[Case], None], ...] = (
    *checks_attach.CHECKS,
    *checks_strength_merge.CHECKS,
    *checks_state.CHECKS,
    *checks_run.CHECKS,
    *checks_device.CHECKS,
)
HOST_CHECKS = checks_host.CHECKS
METHOD_AXIS = frozenset(body.__name__ for body in (*checks_state.METHOD_AXIS, *checks_device.CHECKS))
"""Names of checks that run on the first small model that fits, not on every one: of the method alone, or too slow for all."""

REPRESENTATIVES = frozenset({"lora", "dora", "ssf", "bitfit", "norm_tuning", "adaptformer", "adapter_plus", "ip_adapter"})
"""One method per mechanism: weights in both forms, weights with their bias, biases, norms, branches, streams, attention.

They are checked on every small model of a host, other methods on those of `Host.core`.
"""

MethodLike = str | type[Method] | Method
HostLike = str | type[Host] | Host
Subject = MethodLike | HostLike | tuple[MethodLike, HostLike]


def check_method(method: MethodLike, host: HostLike | None = None, *, expected: Mapping[str, str] | None = None) -> Records:
    """Runs every check of a method on the small models of a host, or of all compatible hosts.

    Args:
        method: a name, a class (checked with the first of its `examples()`), or a config instance.
        host: a name, class or instance; None means every host with the sites that the method needs.
        expected: checks that are expected to fail, with the reason: a check's name, or a pattern of ids such as
            `"lora-timm_vit-*-autocast"`. Strict: one that passes is a failure.
    Returns:
        The records; `.failures` is empty if the method conforms. `print()` shows one line per check.
    Raises:
        UnsupportedSite: the host has no site that the method needs. UnknownName: no such method or host.

    Examples:
        >>> check_method("bitfit", "clip_text").failures
        ()
    """
    return Records(check.record(expected or {}) for check in method_checks(method, host))


def check_host(host: HostLike, *, expected: Mapping[str, str] | None = None, models: Collection[str] | None = None) -> Records:
    """Runs every check of a host on each of its small models.

    Args:
        host, expected: as for `check_method`, which has the same result.
        models: names of small models; None means all. `("clay",)` for a record of `veneer.transformer_records`.
    Raises:
        UnknownName: no such host, or the host has no small model of a name.
    """
    return Records(check.record(expected or {}) for check in host_checks(host, models))


def parametrize_with_checks(
    subjects: Iterable[Subject], *, expected: Mapping[str, str] | None = None, once: Collection[str] = ()
) -> Any:
    """Parametrizes a test that takes `check` and calls it: one test per check.

        @parametrize_with_checks([MyMethod(rank=2), "my_host", ("lora", "my_host")])
        def test_conformance(check):
            check()

    Args:
        subjects: methods, hosts, and pairs of a method and a host, as for `check_method` and `check_host`. A name of
            both a method and a host refers to the method.
        expected: as for `check_method`; becomes strict `xfail` marks with the reason.
        once: names of checks that run on only one small model per host, such as the expensive `compiles_to_one_graph`; the model
            varies with the method, so that all models of `Host.core` are covered.
    """
    import pytest

    params = []
    for check in (c for subject in subjects for c in _run_once(_checks(subject), once)):
        reason = check.expected(expected or {})
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        params.append(pytest.param(check, id=check.id, marks=marks))
    return pytest.mark.parametrize("check", params)


def _run_once(checks: Sequence[Check], once: Collection[str]) -> Iterator[Check]:
    """The checks, those in `once` on one model of each method and host."""
    models: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        found = models.setdefault((check.method, check.host), [])
        found += [check.model] if check.model not in found and _is_core(check) else []
    thinned = {*once} - METHOD_AXIS  # those of METHOD_AXIS are on one model already
    for check in checks:
        among = models[check.method, check.host]
        if check.name not in thinned or (among and check.model == among[zlib.crc32(check.method.encode()) % len(among)]):
            yield check


def _is_core(check: Check) -> bool:
    """False for the small models of a registered host on which not every method is checked."""
    return check.host not in hosts.names() or check.model in hosts.get(check.host)().core()


def method_checks(method: MethodLike, host: HostLike | None = None) -> list[Check]:
    """The checks of a method, model by model, not yet run."""
    config, other = _configs(method)
    chosen = [_host(host)] if host is not None else [hosts.get(name)() for name in hosts.names()]
    found = _without_repeats(check for each in chosen for check in _on_host(config, other, each))
    if not found:
        where = (
            f"host {chosen[0].name} has no site that it can use" if host is not None else "no host has the sites that it needs"
        )
        rejected = [each.name for each in chosen]
        others = hosts_for(config, [name for name in hosts.names() if name not in rejected])
        raise UnsupportedSite(
            f"{config.name}: {where}. Supported hosts: {', '.join(others) or 'none'}.",
            method=config.name,
            host=rejected[0] if host is not None else "",
            supported_hosts=others,
        )
    return found


def _without_repeats(checks: Iterable[Check]) -> list[Check]:
    """The checks of one method; those of `METHOD_AXIS` only the first time."""
    seen: set[str] = set()
    kept = []
    for check in checks:
        if check.name not in METHOD_AXIS & seen:
            kept.append(check)
        seen.add(check.name)
    return kept


def host_checks(host: HostLike, models: Collection[str] | None = None) -> list[Check]:
    """The checks of a host, model by model, not yet run."""
    found = _host(host)
    names = tuple(found.tiny())
    for model in models or ():
        if model not in names:
            message = f"{found.name}: no small model '{model}'. There are: {', '.join(names)}."
            raise UnknownName(message, model, "model", expected=names)
    return [
        Check(body.__name__, "", found.name, model, functools.partial(_on_trace, body, type(found), model))
        for model in (names if models is None else models)
        for body in HOST_CHECKS
    ]


def checked_models(method: str, host: Host) -> tuple[str, ...]:
    """Names of the small models of a host on which a method is checked."""
    return tuple(host.tiny()) if method in REPRESENTATIVES else host.core()


def _on_host(method: Method, other: Method, host: Host) -> Iterator[Check]:
    for model in checked_models(method.name, host):
        try:
            sites = usable_sites(method, host, model)
            if sites and type(other) is type(method) and other != method:
                names = {site.name for site in sites}
                sites = tuple(site for site in usable_sites(other, host, model) if site.name in names)
        except ImportError as error:
            yield Check("library", method.name, host.name, model, functools.partial(_without_library, error))
            continue
        if sites:
            case = Case(method, host, model, sites, other)
            yield from (Check(b.__name__, method.name, host.name, model, functools.partial(b, case)) for b in METHOD_CHECKS)


def _on_trace(body: Callable[[Any], None], host: type[Host], model: str) -> None:
    try:
        fresh_model(host(), model)
    except ImportError as error:
        _without_library(error)
    body(trace(host, model))


def _without_library(error: ImportError) -> None:
    raise Skip(f"its library is not installed: {error}")


def _checks(subject: Any) -> Sequence[Check]:
    if isinstance(subject, tuple):
        return method_checks(*subject)
    host = isinstance(subject, Host) or (isinstance(subject, type) and issubclass(subject, Host))
    if host or (isinstance(subject, str) and subject in hosts.names() and subject not in methods.names()):
        return host_checks(subject)
    return method_checks(subject)


def _configs(method: MethodLike) -> tuple[Method, Method]:
    if isinstance(method, Method):
        return method, next((m for m in reversed(type(method).examples()) if m != method), method)
    return (methods.get(method) if isinstance(method, str) else method).examples()


def _host(host: HostLike) -> Host:
    if isinstance(host, Host):
        return host
    return (hosts.get(host) if isinstance(host, str) else host)()
