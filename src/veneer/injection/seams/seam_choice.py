"""Which seam joins a site: decided by what the host declares and which forms the adapter offers, never by the method's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import UnsupportedSite
from ..method import Adapter
from ..sites import (
    AttentionSite,
    BranchSite,
    FeatureSite,
    NormSite,
    ParamSite,
    PixelSite,
    Port,
    PromptSite,
    ResidualSite,
    Site,
    StreamSite,
    TokenSite,
    VocabularySite,
    WeightSite,
)
from .adapter_calls import base_tensor
from .attention_seam import ProcessorSeam
from .call_seam import CallSeam, Seam
from .effective_bias import Below, Shift, shift_site
from .residual_seam import ResidualSeam
from .sequence_seams import TokenSeam, VocabularySeam
from .shape_seam import SwitchSeam
from .weight_seam import WeightSeam, changeable

Group = tuple[Any, ...]


def seams_for(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]]) -> list[tuple[str, Seam]]:
    """(component, seam) for all parts; slices of one module share a seam.

    Raises:
        UnsupportedSite: the adapter offers no form that the site can take.
    """
    groups: dict[Group, list[tuple[Site, Adapter]]] = {}
    for site, adapter in parts:
        tower = towers[site.component]
        group = _group(site, adapter, tower)
        groups.setdefault((site.component, *group), []).append((site, adapter))
        if group[0] is WeightSeam and hasattr(adapter, "bias"):
            shift = shift_site(site, adapter)
            key = (site.component, WeightSeam, shift.path, shift.param)
            groups.setdefault(key, []).append((shift, Shift(adapter, Below(tower, site, adapter))))
    return [(component, kind(towers[component], group, *rest)) for (component, kind, *rest), group in _uniform(groups)]


def _uniform(groups: Mapping[Group, list[tuple[Site, Adapter]]]) -> list[tuple[Any, list[tuple[Site, Adapter]]]]:
    """Drop what only told groups apart: seams that find their place in the site take no further arguments."""
    return [((key[0], key[1], *(key[2:] if issubclass(key[1], CallSeam) else ())), group) for key, group in groups.items()]


def _group(site: Site, adapter: Adapter, tower: nn.Module) -> Group:
    if isinstance(site, (WeightSite, ParamSite, NormSite)):
        if adapter.prefers_weight and changeable(base_tensor(tower, site.path, site.param)):
            return (WeightSeam, site.path, site.param)
        if site.called and hasattr(adapter, "output"):
            dim = (1 if site.kind == "conv" else -1) if isinstance(site, WeightSite) else site.channel_dim
            return (CallSeam, Port(site.path, "in"), Port(site.path, "out"), dim)
        if site.called and site.rows is None and hasattr(adapter, "input"):
            return (CallSeam, Port(site.path, "in"), Port(site.path, "in"))
        _require(site, adapter, "weight")
        return (WeightSeam, site.path, site.param)
    if isinstance(site, TokenSite):
        _require(site, adapter, "insert")
        return (TokenSeam, site.name)
    if isinstance(site, AttentionSite):
        _require(site, adapter, "attend")
        return (ProcessorSeam, site.name)
    if isinstance(site, ResidualSite):
        _require(site, adapter, "residuals")
        return (ResidualSeam, site.name)
    _require(site, adapter, "output")
    if isinstance(site, VocabularySite):
        return (VocabularySeam, site.name)
    return (SwitchSeam if adapter.switches else CallSeam, *_ports(site, adapter), -1)


def _ports(site: Site, adapter: Adapter) -> tuple[Port, Port]:
    if isinstance(site, (BranchSite, StreamSite)) and adapter.reads == "write":
        write = site.write if isinstance(site, BranchSite) else Port(site.path, "out")
        return write, write
    if isinstance(site, BranchSite):
        read = site.normed if adapter.reads == "normed" else site.read
        if read is None:
            raise UnsupportedSite(
                f"{site.name}: {type(adapter).__name__} reads the branch after its norm, and there is no norm in front of it.",
                site=site.name,
                given=adapter.reads,
            )
        return read, site.write
    if isinstance(site, (StreamSite, PromptSite)):
        return Port(site.path, "in"), Port(site.path, "out")
    if isinstance(site, FeatureSite):
        return site.read or site.port, site.port
    if isinstance(site, PixelSite):
        return site.port, site.port
    raise UnsupportedSite(f"{site.name}: no seam joins a {type(site).__name__} yet.", site=site.name)


def _require(site: Site, adapter: Adapter, form: str) -> None:
    if not hasattr(adapter, form):
        has = [f for f in ("output", "input", "weight", "insert", "attend", "residuals") if hasattr(adapter, f)]
        raise UnsupportedSite(
            f"{site.name}: a {type(site).__name__}{'' if getattr(site, 'called', True) else ' that is read, not called,'} needs "
            f"the {form} form; {type(adapter).__name__} offers {', '.join(has) or 'none'}.",
            site=site.name,
            given=tuple(has),
            expected=form,
        )
