"""Methods that are compatible with a classifier."""

from __future__ import annotations

import functools

from veneer.injection import methods
from veneer.injection.attachment.plan import supports
from veneer.injection.attention_sites import SelfAttentionSite
from veneer.injection.method import Method
from veneer.injection.multimodal_prompt_site import MultimodalPromptSite
from veneer.injection.sites import (
    BranchSite,
    FeatureSite,
    NormSite,
    ParamSite,
    PixelSite,
    PromptSite,
    Site,
    StreamSite,
    TokenSite,
    WeightSite,
)
from veneer.injection.towers import towers_of

from .loading import is_clip_name, open_classifier

IMAGE_SITES: tuple[type[Site], ...] = (
    WeightSite, NormSite, BranchSite, StreamSite, TokenSite, SelfAttentionSite, ParamSite, PixelSite, FeatureSite,
)  # fmt: skip
"""Types of sites of an image tower."""


def compatible_methods(model: str) -> list[str]:
    """Names of the methods that are compatible with a classifier, sorted.

    The list depends on the kind of model only: no model is built, so that attaching may still fail for some architectures.

    Args:
        model: as in `TransferConfig`. For a CLIP the list includes `zero_shot`.
    """
    clip = is_clip_name(model)
    kinds = (*IMAGE_SITES, PromptSite, MultimodalPromptSite) if clip else IMAGE_SITES
    found = [name for name in methods.names() if _supports(methods.get(name), kinds, clip)]
    return sorted([*found, "zero_shot"]) if clip else found


@functools.cache
def methods_with_sites(model: str) -> frozenset[str]:
    """The compatible methods that have a site in a classifier with a new head. Loads the model."""
    sites = [site for tower in towers_of(open_classifier(model, ["a", "b"]).model) for site in tower.sites]
    return frozenset(
        name
        for name in compatible_methods(model)
        if name == "zero_shot" or any(supports(methods.get(name), site) for site in sites)
    )


def _supports(method: type[Method], kinds: tuple[type[Site], ...], prompted: bool) -> bool:
    without = {"tokens"} if prompted else set[str]()  # a CLIP offers no tokens before pooling
    fitting = (n for n in method.needs if n.where.get("prompted", prompted) == prompted and not without & n.where.keys())
    return not method.conditions and any(need.site in kinds for need in fitting)
