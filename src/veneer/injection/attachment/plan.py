"""Selects sites and builds their adapters, before `attach` changes the model."""

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
from ..quantized_weight import is_quantized
from ..registry import hosts
from ..seams.adapter_calls import module_at
from ..select import alternatives, describe_roles, expand, has_role, select
from ..sites import NormSite, ParamSite, Site, WeightSite
from ..towers import Tower, towers_of
from .deferred_init import build_context, check_size, is_init_deferred, is_loading


@dataclass(frozen=True)
class Plan:
    """Selected sites with their adapters, and base parameters to train.

    Args:
        where, train: the selections as tuples of patterns.
        towers: component to module, of the components with adapters or trained base parameters.
        parts: (site, adapter), in site order. `supported_sites`: all sites that the method supports.
        extras: saved name to (component, parameter path) of base parameters to train.
    """

    method: Method
    where: tuple[str, ...]
    train: tuple[str, ...]
    towers: Mapping[str, nn.Module]
    parts: tuple[tuple[Site, Adapter], ...]
    supported_sites: tuple[Site, ...]
    extras: dict[str, tuple[str, str]]


def supports(method: Method | type[Method], site: Site) -> bool:
    """True if the method supports `site`: it meets one of `method.needs`."""
    return any(
        isinstance(site, need.site)
        and (not need.roles or any(fnmatchcase(site.role, r) for r in need.roles))
        and all(_is_allowed(getattr(site, key), allowed) for key, allowed in need.where.items())
        for need in method.needs
    )


def _is_allowed(value: Any, allowed: Any) -> bool:
    """True if a site's field has an allowed value, see `Need.where`."""
    if allowed is ...:
        return value is not None
    return value in allowed if isinstance(allowed, tuple) else bool(value == allowed)


def plan(towers: Sequence[Tower], method: Method, where: str | Sequence[str] | None, train: str | Sequence[str]) -> Plan:
    """Selects sites and builds their adapters.

    Raises:
        UnsupportedSite: the model has no site that the method supports.
        SelectionError: a pattern matches nothing, or a site is both adapted and trained.
    """
    all_sites = [s for t in towers for s in t.sites]
    supported, main = _supported_sites(towers, method)
    if not supported:
        raise _unsupported_model(towers, method, all_sites)
    if where is None:
        defaults = (method.default, method.fallback)
        where = next((w for w in defaults if select(supported, w, main, strict=False)), method.default)
        chosen = select(supported, where, main, strict=False)
    else:
        chosen = select(supported, where, main)
    if not (chosen := list(method.distinct_sites(chosen))):
        roles = ", ".join(sorted({s.role for s in supported}))
        raise SelectionError(
            f"{method.name}: the model has none of the default sites {method.default}. Pass where=…; available roles: {roles}.",
            where=method.name,
            given=method.default,
            expected=tuple(sorted({s.role for s in supported})),
        )
    _check_unused_patterns(method, chosen)
    modules = {t.component: t.module for t in towers}
    shared = {
        component: _build_shared(method, [s for s in chosen if s.component == component], modules[component])
        for component in dict.fromkeys(s.component for s in chosen)
    }
    parts = tuple((site, _build(method, site, modules[site.component], shared[site.component])) for site in chosen)
    extras = _extra_parameters(all_sites, train, main, chosen, modules)
    used = {s.component for s in chosen} | {component for component, _ in extras.values()}
    return Plan(
        method=method,
        where=_as_tuple(where),
        train=_as_tuple(train),
        towers={c: m for c, m in modules.items() if c in used},
        parts=parts,
        supported_sites=tuple(supported),
        extras=extras,
    )


def effective_where(model: Any, method: Method, *selections: Sequence[str]) -> tuple[str, ...]:
    """The first of several selections that matches a supported site, reduced to the patterns that match; () if none does.

    Patterns of a default may match nothing, those of a user must match. So a selection that extends a default starts from this.
    """
    supported, main = _supported_sites(towers_of(model), method)
    return next((matching for where in selections if (matching := alternatives(supported, where, main))), ())


def _supported_sites(towers: Sequence[Tower], method: Method) -> tuple[list[Site], frozenset[str]]:
    """The sites that a method supports, and the towers that patterns without a tower select from."""
    supported = [s for t in towers for s in t.sites if supports(method, s)]
    return supported, frozenset(s.tower for t in towers if t.main or len(towers) == 1 for s in t.sites)


def _check_unused_patterns(method: Method, chosen: Sequence[Site]) -> None:
    """Raises `SelectionError` if a pattern of `by_site`, or an alternative of its braces, matches no selected site.

    A partial load skips the check: the model may lack the sites that a pattern is for.
    """
    if is_loading() and not is_init_deferred():
        return
    names, roles = {site.name for site in chosen}, {site.role for site in chosen}

    def matches(pattern: str) -> bool:
        if pattern.startswith("name:"):
            return pattern.removeprefix("name:") in names
        return any(has_role(pattern, role) for role in roles)

    patterns = [pattern for key in method.by_site for pattern in ([key] if key.startswith("name:") else expand(key))]
    unused = [pattern for pattern in patterns if not matches(pattern)]
    if unused:
        raise SelectionError(
            f"{method.name}: by_site has {', '.join(unused[:4])}, which matches none of the {len(chosen)} selected sites. "
            f"Selected roles: {describe_roles(chosen)}.",
            pattern=unused[0],
            where="by_site",
            given=tuple(unused),
        )


def _build_shared(method: Method, sites: Sequence[Site], tower: nn.Module) -> nn.Module | None:
    base = _base_tensor(sites[0], tower)
    device = _adapter_device(base)
    with _init_device(device):
        check_size(lambda: _state_size(method.build_shared(sites)), "")
        shared = method.build_shared(sites)
    if shared is not None:
        _move(shared, device, _adapter_dtype(base))
    return shared


def _state_size(shared: nn.Module | None) -> int:
    """Number of elements in the state dict of a module."""
    return sum(tensor.numel() for tensor in shared.state_dict().values()) if shared is not None else 0


def _build(method: Method, site: Site, tower: nn.Module, shared: nn.Module | None) -> Adapter:
    base = _base_tensor(site, tower)
    device = _adapter_device(base)
    with _init_device(device), build_context(device):
        try:
            config = method.at(site)
            check_size(lambda: config.count(site), site.name)
            adapter = config.build(site)
        except ValueError as error:
            message = f"{method.name}: {site.name}: {error}"
            raise UnsupportedSite.from_error(error, message, site=site.name, method=method.name) from error
    _move(adapter, device, _adapter_dtype(base))
    if shared is not None:
        adapter.add_module("shared", shared)
    return adapter


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """`module.to(device, dtype)`, skipped if nothing changes."""
    tensors = [t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    if any(t.device != device or t.dtype != dtype for t in tensors):
        module.to(device=device, dtype=dtype)


def _adapter_device(base: torch.Tensor) -> torch.device:
    """The base weight's device; the CPU for tensors of a file if the base model is on `meta`, so that they can be saved again."""
    return torch.device("cpu") if base.is_meta and (is_loading() or is_init_deferred()) else base.device


def _init_device(device: torch.device) -> torch.device:
    """The CPU, so that initial values do not depend on the target device; `meta` if that is the target."""
    return torch.device("meta" if device.type == "meta" else "cpu")


def _adapter_dtype(base: torch.Tensor) -> torch.dtype:
    """Single precision, or the dtype of the base weight if that is wider."""
    return torch.promote_types(base.dtype, torch.float32) if base.is_floating_point() else torch.float32


def _base_tensor(site: Site, tower: nn.Module) -> torch.Tensor:
    """The tensor whose device and dtype the adapter gets: the site's, or the tower's first float parameter."""
    if isinstance(site, (WeightSite, ParamSite, NormSite)):
        value: torch.Tensor = getattr(module_at(tower, site.path), site.param)
        if not is_quantized(value):
            return value
    floats = (p for p in tower.parameters() if p.is_floating_point() and not is_quantized(p))
    return next(floats, torch.zeros(()))


def _extra_parameters(
    all_sites: Sequence[Site],
    train: str | Sequence[str],
    main: frozenset[str],
    chosen: Sequence[Site],
    modules: Mapping[str, nn.Module],
) -> dict[str, tuple[str, str]]:
    """Saved name to (component, parameter path) of the base parameters that `train` selects."""
    if not train:
        return {}
    candidates = [s for s in all_sites if isinstance(s, (WeightSite, ParamSite)) and s.rows is None]
    adapted = {(s.component, f"{s.path}.{s.param}") for s in chosen if isinstance(s, (WeightSite, ParamSite, NormSite))}
    names: dict[tuple[str, str], str] = {}
    for site in select(candidates, train, main):
        assert isinstance(site, (WeightSite, ParamSite))
        module = module_at(modules[site.component], site.path)
        params = [site.param] if isinstance(site, ParamSite) else [n for n, _ in module.named_parameters(recurse=False)]
        for param in params:
            key = (site.component, f"{site.path}.{param}")
            if key in adapted:
                raise SelectionError(
                    f"'{site.name}' is both adapted and in train={train!r}; choose one.", where=site.name, given=train
                )
            names.setdefault(key, f"{site.name}:{param}")
    return {name: key for key, name in names.items()}


def _unsupported_model(towers: Sequence[Tower], method: Method, all_sites: Sequence[Site]) -> UnsupportedSite:
    """The error for a model without any site that the method supports."""
    need = " or ".join(
        f"{n.site.__name__}({', '.join([*n.roles, *(f'{k}={v!r}' for k, v in n.where.items())])})" for n in method.needs
    )
    closest = next((s for s in all_sites for n in method.needs if isinstance(s, n.site)), None)
    has = "no site of that type"
    fields: dict[str, Any] | None = None
    if closest is not None:
        keys = {k for n in method.needs if isinstance(closest, n.site) for k in n.where}
        fields = {k: getattr(closest, k) for k in sorted(keys)} or {"role": closest.role}
        text = ", ".join(f"{k}={v!r}" for k, v in fields.items()) if keys else f"role {closest.role!r}"
        has = f"{type(closest).__name__}({text}) at '{closest.name}'"
    model_hosts = [t.host.name for t in towers]
    supported = hosts_for(method)
    others = [name for name in supported if name not in model_hosts]
    hint = "".join(f" {name} supports it on other models." for name in dict.fromkeys(model_hosts) if name in supported)
    names = ", ".join(model_hosts)
    return UnsupportedSite(
        f"{method.name} needs {need}; host {names} has {has}. Supported hosts: {', '.join(others) or 'none'}.{hint}",
        site=closest.name if closest is not None else "",
        method=method.name,
        host=names,
        supported_hosts=others,
        given=fields,
        expected=need,
    )


def hosts_for(method: Method | type[Method], among: Sequence[str] | None = None) -> list[str]:
    """Names of the hosts whose test models (`Host.core`) have a site that the method supports.

    Hosts whose library is not installed are skipped.

    Args:
        among: names of hosts (default: all).
    """
    supported = []
    for name in hosts.names() if among is None else among:
        try:
            sites = _sites_of_small_models(hosts.get(name))
        except ImportError:
            continue
        if any(supports(method, site) for site in sites):
            supported.append(name)
    return supported


@functools.cache
def _sites_of_small_models(cls: type[Host]) -> tuple[Site, ...]:
    """All sites of a host's core test models. Cached, because building the models is slow; keeps the global random state."""
    host = cls()
    with torch.random.fork_rng(devices=[]):
        models = (host.tiny()[name]() for name in host.core())
        return tuple(site for model in models for site in Tower("", model, host, True).sites)


def _as_tuple(selection: str | Sequence[str]) -> tuple[str, ...]:
    return (selection,) if isinstance(selection, str) else tuple(selection)
