"""Learning rates by block: factors for the sites that a selection matches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.errors import OptionError, SelectionError
from veneer.injection.select import describe_roles, select
from veneer.injection.sites import Site
from veneer.injection.towers import towers_of

from .loop.optimizers import ParameterGroup


def with_block_rates(
    groups: Sequence[ParameterGroup], attached: Sequence[Attachment], factors: Mapping[str, float]
) -> list[ParameterGroup]:
    """The parameter groups, split so that `lr_scale` is multiplied by the factor of each parameter's site.

    Args:
        factors: selection to factor; of several that match a site, the last applies. A selection is a tower or a stage, such as
            `unet` or `unet.down.0`, or patterns as in `where`.

    Raises:
        OptionError: a factor that is not above 0.
        SelectionError: a selection matches no trained parameter, or sites with different factors share a parameter.
    """
    if not factors:
        return list(groups)
    _check_factors(factors)
    return split_groups(groups, _factors_by_parameter(attached, factors))


def split_groups(groups: Sequence[ParameterGroup], factors: Mapping[int, float]) -> list[ParameterGroup]:
    """The parameter groups, split so that `lr_scale` is multiplied by the factor of each parameter.

    Args:
        factors: id of a parameter to its factor; 1 for parameters without one.
    """
    return [part for group in groups for part in _split(group, factors)]


def _check_factors(factors: Mapping[str, float]) -> None:
    wrong = {text: factor for text, factor in factors.items() if not 0 < factor < math.inf}
    if wrong:
        text, factor = next(iter(wrong.items()))
        message = f"block_lr: the factor of {text!r} is {factor}; expected a number above 0. To train fewer sites, use --where."
        raise OptionError(message, option="block_lr", where=text, given=factor, expected="above 0")


def _split(group: ParameterGroup, factors: Mapping[int, float]) -> Iterator[ParameterGroup]:
    """Groups with one factor each; without a factor the group as it is."""
    parts: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    for factor, params in parts.items():
        name = group.get("name", "")
        label = name if factor == 1 else f"{name} x {factor:g}"
        yield {**group, "params": params, "lr_scale": group.get("lr_scale", 1.0) * factor, "name": label}


def _factors_by_parameter(attached: Sequence[Attachment], factors: Mapping[str, float]) -> dict[int, float]:
    """Factor of each trained parameter, by id."""
    unused = dict.fromkeys(factors)
    owners: dict[int, dict[str, float]] = {}
    trained: list[Site] = []
    for attachment in attached:
        sites, main = sites_of(attachment)
        parameters = list(parameters_by_site(attachment, sites))
        chosen = [site for site in sites.values() if any(name == site.name for name, _ in parameters)]
        trained += chosen
        by_site: dict[str, float] = {}
        for text, factor in factors.items():
            for site in _matches(chosen, text, main):
                by_site[site.name] = factor
                unused.pop(text, None)
        for name, parameter in parameters:
            owners.setdefault(id(parameter), {})[name] = by_site.get(name, 1.0)
    if unused:
        raise _no_match(next(iter(unused)), trained)
    return {key: shared_factor(by_site, "block_lr") for key, by_site in owners.items()}


def sites_of(attachment: Attachment) -> tuple[dict[str, Site], frozenset[str]]:
    """Sites of the adapted towers by name, and the towers that patterns without a tower select from."""
    modules: Any = attachment.towers
    towers = towers_of(modules[""] if "" in modules else SimpleNamespace(components=modules))
    sites = {site.name: site for tower in towers for site in tower.sites}
    sites |= {name: site for name, (site, _) in attachment.parts.items()}
    return sites, frozenset(s.tower for t in towers if t.main or len(towers) == 1 for s in t.sites)


def parameters_by_site(attachment: Attachment, sites: Mapping[str, Site]) -> Iterator[tuple[str, Tensor]]:
    """Site name and parameter of adapters and of trained base parameters; a shared parameter once per site."""
    for name, (_, adapter) in attachment.parts.items():
        yield from ((name, parameter) for parameter in adapter.parameters() if parameter.requires_grad)
    for key, parameter in attachment.trained.items():
        name = key.rpartition(":")[0]
        if name in sites:
            yield name, parameter


def _matches(sites: Sequence[Site], text: str, main: frozenset[str]) -> list[Site]:
    """The sites of a tower or stage, or those that patterns select."""
    tower, _, stage = text.partition(".")
    if tower and "/" not in text and tower in {site.tower for site in sites}:
        inside = [site for site in sites if site.tower == tower]
        return [site for site in inside if not stage or f"{site.stage or ''}.".startswith(f"{stage}.")]
    return select(sites, text, main, strict=False)


def _no_match(text: str, sites: Sequence[Site]) -> SelectionError:
    stages = sorted({f"{site.tower}.{site.stage}" if site.stage else site.tower for site in sites if site.tower})
    message = (
        f"block_lr: {text!r} matches none of the {len(sites)} trained sites. Expected a tower or stage ({', '.join(stages)}), or "
        f"a selection as in --where; trained roles: {describe_roles(sites)}."
    )
    return SelectionError(message, pattern=text, where="block_lr", given=text, expected=tuple(stages))


def shared_factor(by_site: Mapping[str, float], option: str) -> float:
    """The factor of a parameter, which must be the same at all of its sites.

    Args:
        by_site: name of each site to its factor. `option`: that sets the factors, for the error.
    Raises:
        SelectionError: the factors differ.
    """
    if len(set(by_site.values())) > 1:
        shared = f"{len(by_site)} sites share a parameter, and their factors are {sorted(set(by_site.values()))}"
        remedy = "Give them one factor" if option == "block_lr" else f"Leave out {option}, or use a method without shared weights"
        message = f"{option}: {shared}. {remedy}."
        raise SelectionError(message, where=option, given=dict(by_site))
    return next(iter(by_site.values()))
