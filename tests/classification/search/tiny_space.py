"""A small ViT with four blocks, and the spaces of sub-networks on it."""

from __future__ import annotations

from torch import nn

from veneer.classification.search.block_sites import BlockSites
from veneer.classification.search.search_methods import parse_methods
from veneer.classification.search.space import Space
from veneer.classification.search.spaces import build_space

METHODS = "lora, adaptformer, vpt"
S4_METHODS = "adaptformer, prefix_tuning(hidden=0), bitfit, lora"
BUDGETS = {"noah": 2500, "blocks": 2500, "s4": 6000}


def tiny_vit(depth: int = 4) -> nn.Module:
    """A ViT of width 24."""
    import timm

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=depth, **options)
    return model.eval()


def tiny_sites(space: str = "noah", methods: str | None = None, groups: int | None = None, depth: int = 4) -> BlockSites:
    """The blocks of the small ViT."""
    parsed = parse_methods(methods or (S4_METHODS if space == "s4" else METHODS), (1, 2, 4))
    return BlockSites(tiny_vit(depth), parsed, groups, spindle=space == "s4")


def tiny_space(space: str, budget: int | None = None) -> Space:
    """A space on the small ViT."""
    return build_space(space, tiny_sites(space), budget or BUDGETS[space])
