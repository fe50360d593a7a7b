"""Config of `veneer transfer` for a sub-network, and the sub-networks of one method at a budget."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from ..config import TransferConfig
from .block_sites import BlockSites
from .sub_network import SubNetwork


def config_of(base: TransferConfig, sites: BlockSites, sub: SubNetwork) -> TransferConfig:
    """The config that trains a sub-network: `base` with its methods, `options` and `method_where`.

    A method's rate is that of the base times the ratio of its default to the default of the search's first method, and the
    head's rate that of the base, whichever methods a sub-network has.
    """
    names: list[str] = []
    options: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for index, (method, row) in enumerate(zip(sites.methods, sub.sizes, strict=True)):
        sizes = {site.name: size for g, size in enumerate(row) if size for site in sites.group_sites(index, g)}
        if not sizes:
            continue
        names.append(method.name)
        common = min(sizes.values(), key=lambda size: (-Counter(sizes.values())[size], size))
        by_site = {f"name:{site}": method.options_of(size) for site, size in sizes.items() if size != common}
        options[method.name] = {**method.options, **method.options_of(common), **({"by_site": by_site} if by_site else {})}
        where[method.name] = " ".join(f"name:{site}" for site in sizes)
    rates = {method.name: method.learning_rate for method in sites.methods}
    first = sites.methods[0]
    peak = first.learning_rate if base.learning_rate is None else base.learning_rate
    return dataclasses.replace(
        base, method="+".join(names), options={name: each for name, each in options.items() if each}, method_where=where,
        learning_rate=peak * rates[names[0]] / first.learning_rate, head_learning_rate=peak,
    )  # fmt: skip


def single_method(sites: BlockSites, method: int, budget: int) -> SubNetwork | None:
    """One method with the largest size that the budget allows in all blocks, or None if no size has so few parameters."""
    groups = range(len(sites.groups))
    size = sites.largest_size(method, groups, budget)
    rows = (tuple(size if m == method and sites.group_sites(m, g) else 0 for g in groups) for m in range(len(sites.methods)))
    return SubNetwork(tuple(rows)) if size else None
