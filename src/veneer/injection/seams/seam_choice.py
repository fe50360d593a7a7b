"""Chooses the seam of a site from what the host declares and which forms the adapter implements, never from the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..adapter_forms import (
    AttentionAdapter,
    BiasAdapter,
    InputAdapter,
    OutputAdapter,
    ResidualAdapter,
    TokenAdapter,
    VocabularyAdapter,
    WeightAdapter,
)
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
from .call_seam import CallSeam, SwitchSeam
from .effective_weight import BiasForm, EffectiveWeight, bias_site
from .residual_seam import ResidualSeam
from .seam import Seam
from .sequence_seams import TokenSeam, VocabularySeam
from .weight_seam import WeightSeam, changeable

Key = tuple[Any, ...]  # (seam class, what tells places apart)


def seams_for(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]]) -> list[tuple[str, Seam]]:
    """Pairs of component and seam for all parts; slices of one module share a seam.

    Raises:
        UnsupportedSite: the adapter implements no form that the site supports.
    """
    groups: dict[Key, list[tuple[Site, Adapter]]] = {}
    for site, adapter in parts:
        tower = towers[site.component]
        key = _key(site, adapter, tower)
        groups.setdefault((site.component, *key), []).append((site, adapter))
        if key[0] is WeightSeam and isinstance(adapter, BiasAdapter):
            bias = bias_site(site, adapter)
            form = BiasForm(adapter, EffectiveWeight(tower, site, adapter))
            groups.setdefault((site.component, WeightSeam, bias.path, bias.param), []).append((bias, form))
    return [(component, kind(towers[component], group, *rest)) for (component, kind, *rest), group in _with_arguments(groups)]


def _with_arguments(groups: Mapping[Key, list[tuple[Site, Adapter]]]) -> list[tuple[Any, list[tuple[Site, Adapter]]]]:
    """Component, class and further arguments of each seam. Call seams take arguments; others read theirs from the site."""
    return [((key[0], key[1], *(key[2:] if issubclass(key[1], CallSeam) else ())), group) for key, group in groups.items()]


def _key(site: Site, adapter: Adapter, tower: nn.Module) -> Key:
    """The seam class of a part, and what parts of one seam have in common."""
    if isinstance(site, (WeightSite, ParamSite, NormSite)):
        if adapter.prefers_weight and changeable(base_tensor(tower, site.path, site.param)):
            return (WeightSeam, site.path, site.param)
        if site.called and isinstance(adapter, OutputAdapter):
            dim = (1 if site.kind == "conv" else -1) if isinstance(site, WeightSite) else site.channel_dim
            return (CallSeam, Port(site.path, "in"), Port(site.path, "out"), dim)
        if site.called and site.rows is None and isinstance(adapter, InputAdapter):
            return (CallSeam, Port(site.path, "in"), Port(site.path, "in"))
        _require(site, adapter, WeightAdapter, "weight")
        return (WeightSeam, site.path, site.param)
    if isinstance(site, TokenSite):
        _require(site, adapter, TokenAdapter, "insert")
        return (TokenSeam, site.name)
    if isinstance(site, AttentionSite):
        _require(site, adapter, AttentionAdapter, "attend")
        return (ProcessorSeam, site.name)
    if isinstance(site, ResidualSite):
        _require(site, adapter, ResidualAdapter, "residuals")
        return (ResidualSeam, site.name)
    if isinstance(site, VocabularySite):
        _require(site, adapter, VocabularyAdapter, "ids")
        return (VocabularySeam, site.name)
    _require(site, adapter, OutputAdapter, "output")
    return (SwitchSeam if adapter.changes_shape else CallSeam, *_ports(site, adapter), -1)


def _ports(site: Site, adapter: Adapter) -> tuple[Port, Port]:
    if isinstance(site, (BranchSite, StreamSite)) and adapter.reads == "write":
        write = site.write if isinstance(site, BranchSite) else Port(site.path, "out")
        return write, write
    if isinstance(site, BranchSite):
        read = site.normed if adapter.reads == "normed" else site.read
        if read is None:
            raise UnsupportedSite(
                f"{site.name}: {type(adapter).__name__} reads the branch after its norm, but the branch begins without a norm.",
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
    raise UnsupportedSite(f"{site.name}: there is no seam for a {type(site).__name__}.", site=site.name)


FORMS = ("output", "input", "weight", "insert", "attend", "residuals")


def _require(site: Site, adapter: Adapter, protocol: type, form: str) -> None:
    """Raises `UnsupportedSite` if an adapter does not implement a form."""
    if not isinstance(adapter, protocol):
        has = [name for name in FORMS if hasattr(adapter, name)]
        raise UnsupportedSite(
            f"{site.name}: a {type(site).__name__}{'' if getattr(site, 'called', True) else ' that is read, not called,'} needs "
            f"the {form} form; {type(adapter).__name__} implements {', '.join(has) or 'none'}.",
            site=site.name,
            given=tuple(has),
            expected=form,
        )
