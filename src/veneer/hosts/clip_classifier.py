"""CLIP classifiers: both towers of the wrapped CLIP, features and logits, and the class prompts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.injection.host import Host, module_names
from veneer.injection.multimodal_prompt_site import MultimodalPromptSite
from veneer.injection.registry import host_of
from veneer.injection.sites import FeatureSite, ParamSite, PromptSite, Site, TokenSite, VocabularySite

from ._describe import TowerPart
from ._within import nested_sites

FAMILY = "veneer.models.clip_classifier.CLIPClassifier"
LENGTH, LAST = 20, 63
NORMS = ("clip.visual.ln_pre", "clip.visual.trunk.norm_pre")
"""Norms between the position embedding and the first block of an image tower."""


class ClipClassifier(Host):
    """The sites of the wrapped CLIP, under `clip.`, and `head.features`, `head.logits` and `head.prompts`.

    The texts are the classifier's own, so that its vocabulary accepts no new tokens. With a linear head only the image tower has
    sites, because no text is encoded.
    """

    name: ClassVar[str] = "clip_classifier"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "open_clip"

    def matches(self, model: nn.Module) -> bool:
        return FAMILY in module_names(model)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        head, linear = TowerPart(model, self.tower, component), isinstance(model.get_submodule("head"), nn.Linear)
        texts = head.module("head.texts")
        prompted = texts is not None and texts.accepts_embeddings
        nested = [*nested_sites(model, "clip", component=component)]
        for site in nested:
            read = site.tower == self.tower or (not linear and site.tower in ("text", "joint"))
            if read and not isinstance(site, (FeatureSite, VocabularySite)):
                yield replace(site, prompted=prompted) if isinstance(site, ParamSite) else site
        width = head.module("head").in_features
        if prompted:
            fields = {"width": texts.width, "features": width, "classes": texts.names, "tokenizer": texts.tokenizer}
            yield _prompts(head.at(tower="text"), texts.layers, fields, nested)
        yield from head.features("head", width)
        yield from head.layer("head", "head")

    def sample(self, model: nn.Module) -> dict[str, Any]:
        clip: Any = model.get_submodule("clip")
        host = host_of(clip)
        assert host is not None
        return {"image": host.sample(clip)["image"]}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        resnet = {"layers": [1, 1, 1, 1], "width": 4, "head_width": 32, "patch_size": None, "image_size": 64}
        trunk = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token"}
        return {
            "vit": lambda: _build("CLIP"),
            "resnet": lambda: _build("CLIP", resnet),
            "timm": lambda: _build("CustomTextCLIP", trunk),
            "linear": lambda: _build("CLIP", head="linear"),
        }


def _prompts(part: TowerPart, layers: int, fields: dict[str, Any], nested: Sequence[Site]) -> PromptSite:
    """The prompts, with the tokens of the image tower if all of its blocks accept more."""
    facts: dict[str, Any] = {"name": "head.prompts", "role": "prompts", "path": "head.texts", **fields, **part.labels}
    images = tuple(s for s in nested if isinstance(s, TokenSite) and s.role == "tokens.block" and s.tower == "vision")
    if not images or not all(site.can_insert for site in images):
        return PromptSite(**facts)
    norm = next((path for path in NORMS if part.module(path) is not None), "")
    return MultimodalPromptSite(**facts, layers=layers, images=images, image_norm=norm)


def _build(cls: str, vision: Mapping[str, Any] | None = None, head: Any = "text") -> nn.Module:
    import open_clip

    from veneer.models.clip_classifier import CLIPClassifier

    config = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12, **(vision or {})}
    text = {"context_length": LENGTH, "vocab_size": LAST + 1, "width": 20, "heads": 2, "layers": 2}
    clip = getattr(open_clip.model, cls)(embed_dim=16, vision_cfg=config, text_cfg=text)
    return CLIPClassifier(clip, small_tokenizer, ["toy cat", "dog", "red car"], ["a {}.", "my {}"], head).eval()


def small_tokenizer(texts: Sequence[str], context_length: int = LENGTH) -> Tensor:
    """Word ids from checksums, between a start id and the largest id, zero-padded; long texts are truncated."""
    rows = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        words = [1 + zlib.crc32(word.encode()) % (LAST - 2) for word in re.findall(r"\w+|[^\w\s]", text.lower())]
        ids = [LAST - 1, *words[: context_length - 2], LAST]
        row[: len(ids)] = torch.tensor(ids)
    return rows
