"""Chooses the seam of a site by the site's fields and the adapter's forms, independent of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..adapter_forms import (
    AttentionAdapter,
    BiasAdapter,
    ImagePromptAdapter,
    InputAdapter,
    InputKeyValueAdapter,
    KeyChoiceAdapter,
    KeyValueAdapter,
    LayeredVocabularyAdapter,
    OutputAdapter,
    ResidualAdapter,
    TokenAdapter,
    VocabularyAdapter,
    WeightAdapter,
)
from ..attention_sites import AttentionSite, SelfAttentionSite
from ..errors import UnsupportedSite
from ..method import Adapter
from ..multimodal_prompt_site import MultimodalPromptSite
from ..quantized_weight import is_ordinary
from ..sites import (
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
from .attention_call_seam import attention_of
from .attention_seam import ProcessorSeam
from .call_seam import CallSeam, SwitchSeam
from .effective_weight import BiasForm, EffectiveWeight, bias_site
from .key_choice_seam import KeyChoiceSeam
from .key_value_seam import KeyValueSeam
from .layered_vocabulary_seam import LayeredVocabularySeam
from .prompt_seam import PromptSeam
from .residual_seam import ResidualSeam
from .seam import Seam
from .self_attention_seam import SelfAttentionSeam
from .sequence_seams import TokenSeam, VocabularySeam
from .weight_seam import WeightSeam

Key = tuple[Any, ...]  # (seam class, then what distinguishes seams of this class)


def seams_for(towers: Mapping[str, nn.Module], parts: Sequence[tuple[Site, Adapter]]) -> list[tuple[str, Seam]]:
    """Pairs of component and seam for all parts; slices of one module share a seam.

    Raises:
        UnsupportedSite: the adapter does not implement the form that the site needs.
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
    return [(component, cls(towers[component], group, *args)) for (component, cls, *args), group in _with_arguments(groups)]


def _with_arguments(groups: Mapping[Key, list[tuple[Site, Adapter]]]) -> list[tuple[Any, list[tuple[Site, Adapter]]]]:
    """Component, class and further arguments of each seam with its parts. Only call seams take further arguments."""
    return [((key[0], key[1], *(key[2:] if issubclass(key[1], CallSeam) else ())), group) for key, group in groups.items()]


def _key(site: Site, adapter: Adapter, tower: nn.Module) -> Key:
    """The class of a part's seam, and the fields that parts of one seam have in common."""
    if isinstance(site, (WeightSite, SelfAttentionSite)) and isinstance(adapter, (KeyValueAdapter, InputKeyValueAdapter)):
        return (KeyValueSeam, attention_of(site))
    if isinstance(site, (SelfAttentionSite, AttentionSite)) and isinstance(adapter, KeyChoiceAdapter):
        return (KeyChoiceSeam, site.path)
    if isinstance(site, (WeightSite, ParamSite, NormSite)):
        if adapter.prefers_weight and is_ordinary(base_tensor(tower, site.path, site.param)):
            return (WeightSeam, site.path, site.param)
        if acts_in_calls(site, adapter) and isinstance(adapter, OutputAdapter):
            dim = (1 if site.kind == "conv" else -1) if isinstance(site, WeightSite) else site.channel_dim
            return (CallSeam, Port(site.path, "in"), Port(site.path, "out"), dim)
        if acts_in_calls(site, adapter):
            return (CallSeam, Port(site.path, "in"), Port(site.path, "in"))
        _require(site, adapter, WeightAdapter, "weight")
        return (WeightSeam, site.path, site.param)
    if isinstance(site, StreamSite) and isinstance(adapter, TokenAdapter):
        return (TokenSeam, site.name)
    if isinstance(site, TokenSite):
        _require(site, adapter, TokenAdapter, "insert")
        return (TokenSeam, site.name)
    if isinstance(site, AttentionSite):
        _require(site, adapter, AttentionAdapter, "attend")
        return (ProcessorSeam, site.name)
    if isinstance(site, SelfAttentionSite):
        _require(site, adapter, AttentionAdapter, "attend")
        return (SelfAttentionSeam, site.name)
    if isinstance(site, ResidualSite):
        _require(site, adapter, ResidualAdapter, "residuals")
        return (ResidualSeam, site.name)
    if isinstance(site, VocabularySite) and isinstance(adapter, LayeredVocabularyAdapter):
        return (LayeredVocabularySeam, site.name)
    if isinstance(site, VocabularySite):
        _require(site, adapter, VocabularyAdapter, "ids")
        return (VocabularySeam, site.name)
    if isinstance(site, MultimodalPromptSite) and isinstance(adapter, ImagePromptAdapter):
        return (PromptSeam, *_ports(site, adapter))
    _require(site, adapter, OutputAdapter, "output")
    return (SwitchSeam if adapter.changes_shape else CallSeam, *_ports(site, adapter), -1)


def acts_in_calls(site: Any, adapter: Adapter) -> bool:
    """True if an adapter of a weight, parameter or norm changes the output or input of its module, or adds keys and values.

    It then does not read the tensor, which may be quantized.
    """
    if isinstance(adapter, (KeyValueAdapter, InputKeyValueAdapter)):
        return True
    form = OutputAdapter if isinstance(adapter, OutputAdapter) or site.rows is not None else InputAdapter
    return bool(site.called) and isinstance(adapter, form)


def _ports(site: Site, adapter: Adapter) -> tuple[Port, Port]:
    """The read port and the write port of a call seam."""
    if isinstance(site, StreamSite) and adapter.input_port == "enter":
        return Port(site.path, "in"), Port(site.path, "in")
    if isinstance(site, (BranchSite, StreamSite)) and adapter.input_port == "write":
        write = site.write if isinstance(site, BranchSite) else Port(site.path, "out")
        return write, write
    if isinstance(site, BranchSite):
        if adapter.input_port == "inner":
            return inner_port(site), site.write
        read = site.normed if adapter.input_port == "normed" else site.read
        if read is None:
            raise UnsupportedSite(
                f"{site.name}: {type(adapter).__name__} reads its branch after the norm, but the branch has no norm.",
                site=site.name,
                given=adapter.input_port,
            )
        return read, site.write
    if isinstance(site, (StreamSite, PromptSite)):
        return Port(site.path, "in"), Port(site.path, "out")
    if isinstance(site, FeatureSite):
        tokens = site.tokens if adapter.input_port == "tokens" else None
        return tokens or site.read or site.port, site.port
    if isinstance(site, PixelSite):
        return site.port, site.port
    raise UnsupportedSite(
        f"{site.name}: adapters with an output form cannot be attached to a {type(site).__name__}.", site=site.name
    )


def inner_port(site: BranchSite) -> Port:
    """What the module of a branch reads: its own input if it writes the branch, else after the norm, or the stream without."""
    path = site.write.path
    return Port(path, "in") if site.name.endswith(f"{path}.branch") else site.normed or site.read


FORMS = ("output", "input", "weight", "insert", "attend", "keys_values", "keys_values_of", "choose", "residuals")


def _require(site: Site, adapter: Adapter, protocol: type, form: str) -> None:
    """Raises `UnsupportedSite` if an adapter does not implement a form."""
    if not isinstance(adapter, protocol):
        implemented = [name for name in FORMS if hasattr(adapter, name)]
        raise UnsupportedSite(
            f"{site.name}: a {type(site).__name__}{'' if getattr(site, 'called', True) else ' that is read, not called,'} needs "
            f"the {form} form; {type(adapter).__name__} implements {', '.join(implemented) or 'none'}.",
            site=site.name,
            given=tuple(implemented),
            expected=form,
        )
