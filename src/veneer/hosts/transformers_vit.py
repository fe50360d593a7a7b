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

CLASSIFIER = "veneer.models.image_classifier.ImageClassifier"
CORE = ("classifier",)
"""The small model on which every method is checked: it alone has features."""


class TransformersViT(Host):
    """Vision models of transformers, each family described by a `VisionRecord`, bare or with a classifier.

    Queries, keys and values have separate layers. Branches are written after a layer scale that is a module, and before one that
    is a parameter of the block (BEiT). Tokens cannot be inserted with relative positions (BEiT), windows (Swin) or a mask of
    patches (SigLIP 2 NaFlex). With a classifier, `features` and `logits` are those of its head. Needs transformers 5.
    """

    name: ClassVar[str] = "transformers_vit"
    tower: ClassVar[str] = "vision"
    library: ClassVar[str] = "transformers"
    main: ClassVar[bool] = False  # image encoders are not what adapters of a diffusion pipeline train

    def matches(self, model: nn.Module) -> bool:
        return CLASSIFIER in module_names(model) or self.record(model) is not None or self._head(model) is not None

    def record(self, model: nn.Module) -> VisionRecord | None:
        """The record of a bare model's family; None if the layout of its modules is that of an older transformers."""
        names, part = _class_names(model), TowerPart(model, self.tower)
        return next((r for r in records().values() if not names.isdisjoint(r.classes) and r.lists(part)), None)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        part = TowerPart(model, self.tower, component)
        if (record := self.record(model)) is not None:
            yield from record.sites(part)
        elif (head := self._head(model)) is not None:
            yield from _with_head(part, head, "classifier")
        elif CLASSIFIER in module_names(model):
            outer: Any = model
            for site in _with_head(part, Head("backbone"), "head"):
                yield replace(site, mean=outer.mean, std=outer.std) if isinstance(site, PixelSite) else site

    def sample(self, model: nn.Module) -> dict[str, Any]:
        head = Head("backbone") if CLASSIFIER in module_names(model) else self._head(model)
        bare = model.get_submodule(head.path) if head is not None else model
        record = self.record(bare)
        return record.sample(SampleInputs(model), bare) if record is not None else {}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        every = ((record, key, config) for record in records().values() for key, config in record.tiny.items())
        models: dict[str, Callable[[], nn.Module]] = {
            key: functools.partial(record.build, **config) for record, key, config in every
        }
        return {**models, "classifier": _classifier}

    def core(self) -> tuple[str, ...]:
        return CORE

    def _head(self, model: nn.Module) -> Head | None:
        """The classifier of a model of transformers."""
        names = _class_names(model)
        found = (head for record in records().values() for name, head in record.heads.items() if name in names)
        return next((head for head in found if self.record(model.get_submodule(head.path)) is not None), None)


def _class_names(model: nn.Module) -> set[str]:
    """Names of transformers' classes of a model."""
    return {name.rpartition(".")[2] for name in module_names(model) if name.startswith("transformers.")}


def _with_head(part: TowerPart, head: Head, path: str) -> Iterator[Site]:
    """The sites of the model in a classifier, and those of the classifier's layer at `path`."""
    for site in nested_sites(part.model, head.path, component=part.component):
        unused = site.name.removeprefix(f"{head.path}.").startswith(head.unused)
        if isinstance(site, PixelSite):
            yield replace(site, port=Port("", "in"))
        elif not unused:
            yield site
        elif not isinstance(site, (BranchSite, StreamSite, TokenSite)):
            yield replace(site, inert=True)
    if isinstance(layer := part.module(path), nn.Linear):
        yield from part.features(path, layer.in_features)
        yield from part.layer(path, "head")


def _classifier() -> nn.Module:
    from veneer.models.image_classifier import ImageClassifier

    record = records()["dinov2_with_registers"]
    model = record.build(**record.tiny["dinov2_registers"])
    return ImageClassifier(model, 10, (28, 28)).eval()
