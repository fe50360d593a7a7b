"""What an attach will do, decided and built before any host module is touched."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import SelectionError, UnsupportedSite
from ..host import Host
from ..method import Adapter, Method
from ..registry import hosts
from ..seams.adapter_calls import module_at
from ..select import alternatives, expand, has_role, select
from ..select import offered as offered_sites
from ..sites import NormSite, ParamSite, Site, WeightSite
from ..towers import Tower, towers_of
from .deferred_init import build_context, check_size, is_init_deferred, is_loading


@dataclass(frozen=True)
class Plan:
    """Sites with built adapters, and base parameters to train as well.

    Args:
        towers: component to module, only those that are touched.
        parts: (site, adapter), in site order. `offered`: every site that the method could use.
        extras: saved name to (component, parameter path) of base parameters to train.
    """

    method: Method
    where: tuple[str, ...]
    train: tuple[str, ...]
    towers: Mapping[str, nn.Module]
    parts: tuple[tuple[Site, Adapter], ...]
    offered: tuple[Site, ...]
    extras: dict[str, tuple[str, str]]


def fits(method: Method | type[Method], site: Site) -> bool:
    """True if one of the method's needs is met by `site`."""
    return any(
        isinstance(site, need.site)
        and (not need.roles or any(fnmatchcase(site.role, r) for r in need.roles))
        and all(_allowed(getattr(site, key), value) for key, value in need.where.items())
        for need in method.needs
    )


def _allowed(got: Any, wanted: Any) -> bool:
    if wanted is ...:
        return got is not None
    return got in wanted if isinstance(wanted, tuple) else bool(got == wanted)


def plan(towers: Sequence[Tower], method: Method, where: str | Sequence[str] | None, train: str | Sequence[str]) -> Plan:
    """Choose sites and build their adapters.

    Raises:
        UnsupportedSite: the model offers nothing that the method needs.
        SelectionError: a pattern matches nothing, or a site is both adapted and trained.
    """
    everything = [s for t in towers for s in t.sites]
    offered, main = _candidates(towers, method)
    if not offered:
        raise _refusal(towers, method, everything)
    if where is None:
        defaults = (method.default, method.elsewhere)
        where = next((w for w in defaults if select(offered, w, main, strict=False)), method.default)
        chosen = select(offered, where, main, strict=False)
    else:
        chosen = select(offered, where, main)
    if not chosen:
        roles = ", ".join(sorted({s.role for s in offered}))
        raise SelectionError(
            f"{method.name}: the model has none of the default sites {method.default}. Pass where=…; available roles: {roles}.",
            where=method.name,
            given=method.default,
            expected=tuple(sorted({s.role for s in offered})),
        )
    _check_unused_patterns(method, chosen)
    modules = {t.component: t.module for t in towers}
    shared = {c: _share(method, [s for s in chosen if s.component == c], modules[c]) for c in {s.component: 0 for s in chosen}}
    parts = tuple((site, _build(method, site, modules[site.component], shared[site.component])) for site in chosen)
    extras = _extras(everything, train, main, chosen, modules)
    touched = {s.component for s in chosen} | {component for component, _ in extras.values()}
    return Plan(
        method=method,
        where=_texts(where),
        train=_texts(train),
        towers={c: m for c, m in modules.items() if c in touched},
        parts=parts,
        offered=tuple(offered),
        extras=extras,
    )


def effective_where(model: Any, method: Method, *selections: Sequence[str]) -> tuple[str, ...]:
    """The first of several selections with usable sites, reduced to the patterns that match; () if there is none.

    Default patterns may match nothing, patterns of a user must match. A selection that extends a default starts from this.
    """
    offered, main = _candidates(towers_of(model), method)
    return next((found for where in selections if (found := alternatives(offered, where, main))), ())


def _candidates(towers: Sequence[Tower], method: Method) -> tuple[list[Site], frozenset[str]]:
    """The sites that a method can use, and the towers that patterns without a tower select from."""
    offered = [s for t in towers for s in t.sites if fits(method, s)]
    return offered, frozenset(s.tower for t in towers if t.main or len(towers) == 1 for s in t.sites)


def _check_unused_patterns(method: Method, chosen: Sequence[Site]) -> None:
    """Raises `SelectionError` if a pattern of `by_site`, or an alternative of its braces, matches no selected site.

    A partial load skips the check: the sites of the pattern may be those that the model lacks.
    """
    if is_loading() and not is_init_deferred():
        return
    names, roles = {site.name for site in chosen}, {site.role for site in chosen}

    def idle(one: str) -> bool:
        return one[5:] not in names if one.startswith("name:") else not any(has_role(one, role) for role in roles)

    patterns = [one for key in method.by_site for one in ([key] if key.startswith("name:") else expand(key))]
    found = [one for one in patterns if idle(one)]
    if found:
        raise SelectionError(
            f"{method.name}: by_site has {', '.join(found[:4])}, which matches none of the {len(chosen)} selected sites. "
            f"There are: {offered_sites(chosen)}.",
            pattern=found[0],
            where="by_site",
            given=tuple(found),
        )


def _share(method: Method, sites: Sequence[Site], tower: nn.Module) -> nn.Module | None:
    base = _tensor(sites[0], tower)
    device = _device(base)
    with _init_device(device):
        check_size(lambda: _size(method.build_shared(sites)), "")
        shared = method.build_shared(sites)
    if shared is not None:
        _put(shared, device, _dtype(base))
    return shared


def _size(shared: nn.Module | None) -> int:
    """How many numbers a module holds."""
    return sum(tensor.numel() for tensor in shared.state_dict().values()) if shared is not None else 0


def _build(method: Method, site: Site, tower: nn.Module, shared: nn.Module | None) -> Adapter:
    base = _tensor(site, tower)
    device = _device(base)
    with _init_device(device), build_context(device):
        try:
            own = method.at(site)
            check_size(lambda: own.count(site), site.name)
            adapter = own.build(site)
        except ValueError as error:
            message = f"{method.name}: {site.name}: {error}"
            raise UnsupportedSite.from_error(error, message, site=site.name, method=method.name) from error
    _put(adapter, device, _dtype(base))
    if shared is not None:
        adapter.add_module("shared", shared)
    return adapter


def _put(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """`module.to(device, dtype)`, skipped if nothing changes."""
    held = [t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    if any(t.device != device or t.dtype != dtype for t in held):
        module.to(device=device, dtype=dtype)


def _device(base: torch.Tensor) -> torch.device:
    """The base weight's device; the CPU for tensors of a file if the base model is on `meta`, so that they can be saved again."""
    return torch.device("cpu") if base.is_meta and (is_loading() or is_init_deferred()) else base.device


def _init_device(device: torch.device) -> torch.device:
    """Initializes on the CPU, so that random values do not depend on the target device; on `meta` if that is the target."""
    return torch.device("meta" if device.type == "meta" else "cpu")


def _dtype(base: torch.Tensor) -> torch.dtype:
    """Single precision, or higher if the base weight has it."""
    return torch.promote_types(base.dtype, torch.float32) if base.is_floating_point() else torch.float32


def _tensor(site: Site, tower: nn.Module) -> torch.Tensor:
    if isinstance(site, (WeightSite, ParamSite, NormSite)):
        value: torch.Tensor = getattr(module_at(tower, site.path), site.param)
        return value
    return next((p for p in tower.parameters() if p.is_floating_point()), torch.zeros(()))


def _extras(
    everything: Sequence[Site],
    train: str | Sequence[str],
    main: frozenset[str],
    chosen: Sequence[Site],
    modules: Mapping[str, nn.Module],
) -> dict[str, tuple[str, str]]:
    if not train:
        return {}
    whole = [s for s in everything if isinstance(s, (WeightSite, ParamSite)) and s.rows is None]
    adapted = {(s.component, f"{s.path}.{s.param}") for s in chosen if isinstance(s, (WeightSite, ParamSite, NormSite))}
    found: dict[tuple[str, str], str] = {}
    for site in select(whole, train, main):
        assert isinstance(site, (WeightSite, ParamSite))
        module = module_at(modules[site.component], site.path)
        params = [site.param] if isinstance(site, ParamSite) else [n for n, _ in module.named_parameters(recurse=False)]
        for param in params:
            place = (site.component, f"{site.path}.{param}")
            if place in adapted:
                raise SelectionError(
                    f"'{site.name}' is both adapted and in train={train!r}; choose one.", where=site.name, given=train
                )
            found.setdefault(place, f"{site.name}:{param}")
    return {key: place for place, key in found.items()}


def _refusal(towers: Sequence[Tower], method: Method, everything: Sequence[Site]) -> UnsupportedSite:
    """The error for a model that offers nothing the method needs."""
    need = " or ".join(
        f"{n.site.__name__}({', '.join([*n.roles, *(f'{k}={v!r}' for k, v in n.where.items())])})" for n in method.needs
    )
    near = next((s for s in everything for n in method.needs if isinstance(s, n.site)), None)
    has = "nothing of that type"
    given: dict[str, Any] | None = None
    if near is not None:
        keys = {k for n in method.needs if isinstance(near, n.site) for k in n.where}
        given = {k: getattr(near, k) for k in sorted(keys)} or {"role": near.role}
        shown = ", ".join(f"{k}={v!r}" for k, v in given.items()) if keys else f"role {near.role!r}"
        has = f"{type(near).__name__}({shown}) at '{near.name}'"
    here = [t.host.name for t in towers]
    supported = hosts_for(method)
    others = [name for name in supported if name not in here]
    same = "".join(f" {name} supports it on other models." for name in dict.fromkeys(here) if name in supported)
    return UnsupportedSite(
        f"{method.name} needs {need}; host {', '.join(here)} has {has}. Supported hosts: {', '.join(others) or 'none'}.{same}",
        site=near.name if near is not None else "",
        method=method.name,
        host=", ".join(here),
        fits=others,
        given=given,
        expected=need,
    )


def hosts_for(method: Method | type[Method], among: Sequence[str] | None = None) -> list[str]:
    """Names of the hosts whose small models have a site for the method. Hosts whose library is not installed are skipped.

    Args:
        among: names of hosts (default: all).
    """
    found = []
    for name in hosts.names() if among is None else among:
        try:
            offered = _offers(hosts.get(name))
        except ImportError:
            continue
        if any(fits(method, site) for site in offered):
            found.append(name)
    return found


@functools.cache
def _offers(host: type[Host]) -> tuple[Site, ...]:
    """All sites of a host's small models, which take long to build and draw numbers of their own."""
    own = host()
    with torch.random.fork_rng(devices=[]):
        return tuple(site for build in own.tiny().values() for site in Tower("", build(), own, True).sites)


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
