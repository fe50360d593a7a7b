"""Which methods a classifier can be taught by."""

from __future__ import annotations

from veneer.injection import methods
from veneer.injection.method import Method
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

from .loading import reads_texts

OF_PICTURES: tuple[type[Site], ...] = (
    WeightSite, NormSite, BranchSite, StreamSite, TokenSite, ParamSite, PixelSite, FeatureSite,
)  # fmt: skip
"""Kinds of site that a tower of pictures has."""


def taught_by(model: str) -> list[str]:
    """Names of the methods that classifiers such as this one can be taught by, sorted.

    No model is built for it, so that one of an unusual architecture may still refuse some.

    Args:
        model: as in `TransferConfig`. A CLIP with texts has `zero_shot` as well: as it is.
    """
    kinds = (*OF_PICTURES, PromptSite) if reads_texts(model) else OF_PICTURES
    found = [name for name in methods.names() if _fits(methods.get(name), kinds)]
    return sorted([*found, "zero_shot"]) if reads_texts(model) else found


def _fits(method: type[Method], kinds: tuple[type[Site], ...]) -> bool:
    return not method.conditions and any(need.site in kinds for need in method.needs)
