"""Vision models of transformers: the families with a record in `_transformers_vision`, from ViT to SigLIP and Swin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from veneer.injection.host import Host, module_names
from veneer.injection.sites import BranchSite, PixelSite, Port, Site, StreamSite, TokenSite

from ._describe import SampleInputs, TowerPart
from ._transformers_vision import records
from ._transformers_vision.vision_record import Head, VisionRecord
from ._within import nested_sites
from .clip_text import clip_sites, sample_ids

CLASSIFIER = "veneer.models.image_classifier.ImageClassifier"
CORE = ("classifier",)
"""The small model on which every method is checked: it alone has features."""


class TransformersViT(Host):
    """Vision models of transformers, each family described by a `VisionRecord`, bare, with a classifier or with a text tower.

    Queries, keys and values have separate layers. Branches are written after a layer scale that is a module, and before one that
    is a parameter of the block (BEiT). Tokens cannot be inserted with relative positions (BEiT), windows (Swin) or a mask of
    patches (SigLIP 2 NaFlex). With a classifier, `features` and `logits` are those of its head. Needs transformers 5.
    """

    name: ClassVar[str] = "transformers_vit"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "transformers"
    main: ClassVar[bool] = False  # image encoders are not what adapters of a diffusion pipeline train

    def matches(self, model: nn.Module) -> bool:
        return self.record(model) is not None or self._outer(model) is not None

    def record(self, model: nn.Module) -> VisionRecord | None:
        """The record of a bare model's family; None if the layout of its modules is that of an older transformers."""
        names, part = _class_names(model), TowerPart(model, self.tower)
        return next((r for r in records().values() if not names.isdisjoint(r.classes) and r.lists(part)), None)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        part = TowerPart(model, self.tower, component)
        if (record := self.record(model)) is not None:
            yield from record.sites(part)
        elif (outer := self._outer(model)) is not None:
            yield from _inner_sites(part, outer)
            yield from _text(part) if part.module("text_model") is not None else _head(part)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        outer, draw, whole = self._outer(model), SampleInputs(model), model
        bare = model.get_submodule(outer.path) if outer is not None else model
        record = self.record(bare)
        inputs = record.sample(draw, bare) if record is not None else {}
        config: Any = getattr(whole, "config", None)
        return {**inputs, "input_ids": sample_ids(draw, config.text_config)} if hasattr(whole, "text_model") else inputs

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        every = ((record, key, config) for record in records().values() for key, config in record.tiny.items())
        models: dict[str, Callable[[], nn.Module]] = {
            key: functools.partial(record.build, **config) for record, key, config in every
        }
        return {**models, "classifier": _classifier}

    def core(self) -> tuple[str, ...]:
        return CORE

    def _outer(self, model: nn.Module) -> Head | None:
        """Where the bare model is in a classifier, or in a model with a text tower."""
        names = _class_names(model)
        heads = [Head("backbone")] if CLASSIFIER in module_names(model) else []
        for record in records().values():
            heads += [head for name, head in record.heads.items() if name in names]
            heads += [Head("vision_model")] if not names.isdisjoint(record.with_text) else []
        return next((head for head in heads if self.record(model.get_submodule(head.path)) is not None), None)


def _class_names(model: nn.Module) -> set[str]:
    """Names of transformers' classes of a model."""
    return {name.rpartition(".")[2] for name in module_names(model) if name.startswith("transformers.")}


def _inner_sites(part: TowerPart, head: Head) -> Iterator[Site]:
    """The sites of the bare model, whose images enter at the root."""
    outer: Any = part.model
    for site in nested_sites(part.model, head.path, component=part.component):
        unused = site.name.removeprefix(f"{head.path}.").startswith(head.unused)
        if isinstance(site, PixelSite):
            mean, std = getattr(outer, "mean", site.mean), getattr(outer, "std", site.std)
            yield replace(site, port=Port("", "in"), mean=mean, std=std)
        elif not unused:
            yield site
        elif not isinstance(site, (BranchSite, StreamSite, TokenSite)):
            yield replace(site, inert=True)


def _head(part: TowerPart) -> Iterator[Site]:
    """The linear layer of a classifier, and its features and logits."""
    path = "head" if CLASSIFIER in module_names(part.model) else "classifier"
    if isinstance(layer := part.module(path), nn.Linear):
        yield from part.features(path, layer.in_features)
        yield from part.layer(path, "head")


def _text(part: TowerPart) -> Iterator[Site]:
    """The projection of the images, the text tower, and the scale and bias of the logits."""
    joint = part.at(tower="joint")
    yield from part.layer("visual_projection", "proj.out")
    yield from clip_sites(part.at(tower="text"), None)
    for param, role in {"logit_scale": "logit.scale", "logit_bias": "logit.bias"}.items():
        if part.has("", param):
            yield joint.parameter("", param, role)


def _classifier() -> nn.Module:
    from veneer.models.image_classifier import ImageClassifier

    record = records()["dinov2_with_registers"]
    model = record.build(**record.tiny["dinov2_registers"])
    return ImageClassifier(model, 10, (28, 28)).eval()
