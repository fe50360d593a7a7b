"""The record of a family of vision models of transformers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from veneer.injection.sites import PixelSite, Port, Site

from .._describe import SampleInputs, TowerPart
from .._records.model_record import ModelRecord
from .vision_parts import VisionPart

PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
ROLES = {
    "cls_token": "embed.class", "class_embedding": "embed.class", "distillation_token": "embed.distil",
    "register_tokens": "embed.register", "position_embeddings": "embed.position", "position_embedding": "embed.position",
    "relative_position_bias_table": "embed.position", "patch_embeddings": "conv.patch", "patch_embedding": "conv.patch",
    "pooler": "proj.out",
}  # fmt: skip
"""Roles of layers and parameters outside of the blocks, by the last component of their path that is here."""


def image_inputs(draw: SampleInputs, model: Any) -> dict[str, Any]:
    """A batch of two images of the size in the model's config."""
    return {"pixel_values": draw.normal(2, model.config.num_channels, *sides(model.config.image_size))}


@dataclass(frozen=True)
class Head:
    """A class with a classifier on a model of a record.

    Args:
        path: attribute of the model. `unused`: beginnings of the names of its sites that the classifier does not read.
    """

    path: str
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VisionRecord(ModelRecord):
    """A family of vision models of transformers. Further arguments as for `ModelRecord`.

    Args:
        heads: name of each class with a classifier to the model in it.
        with_text: names of the classes with the model at `vision_model` and a text tower at `text_model`.
        options: arguments of the class beside the config.
        can_insert: False for a config whose attention fixes the number of tokens.
        takes_images: False if the inputs are patches, with a mask and the shape of the grid, instead of images.
        mean, std: normalization of the published models.
    """

    library: str = "transformers"
    default_roles: ClassVar[Mapping[str, str]] = ROLES
    sample: Callable[[SampleInputs, Any], dict[str, Any]] = image_inputs
    inert: tuple[str, ...] = ("mask_token",)  # only masked image modeling reads it
    heads: Mapping[str, Head] = field(default_factory=dict)
    with_text: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    can_insert: Callable[[Any], bool] = lambda config: True
    takes_images: bool = True
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def sites(self, part: TowerPart) -> Iterator[Site]:
        """Every site of a bare model: its image input and token sequence, then all others in the order of the forward pass."""
        model: Any = part.model
        config, here = model.config, self._vision_part(part)
        if self.takes_images:
            size: Any = (*sides(config.image_size), config.num_channels)
            yield PixelSite(
                name="pixels", role="pixels", port=Port("", "in"), size=size, mean=self.mean, std=self.std, **part.labels
            )
        lists = self.lists(here)
        if len(lists) == 1:
            first, last = f"{lists[0].path}.0", f"{lists[0].path}.{lists[0].count(here) - 1}"
            yield here.tokens("tokens", first, last, config.hidden_size, "tokens.tower")
        yield from super().sites(here)

    def _vision_part(self, part: TowerPart) -> VisionPart:
        """The part, with what the model's config tells of tokens and patches."""
        model: Any = part.model
        config = model.config
        patch: Any = sides(config.patch_size)
        parameters = (getattr(model.embeddings, name, None) for name in PREFIX)
        prefix = sum(math.prod(p.shape[:-1]) for p in parameters if p is not None)
        grid = tuple(side // p for side, p in zip(sides(config.image_size), patch, strict=True)) if self.takes_images else None
        return VisionPart(
            **{name: getattr(part, name) for name in ("model", "tower", "component", "depth", "stage", "guard")},
            place={"prefix_tokens": prefix, "grid": grid}, patch=(*patch, config.num_channels),
            can_insert=self.can_insert(config),
        )  # fmt: skip

    def build(self, **config: Any) -> nn.Module:
        """A model with a config, on random weights."""
        cls: Any = getattr(importlib.import_module(self.library), self.classes[0])
        model: nn.Module = cls(cls.config_class(**config), **self.options)
        return model.eval()


def sides(size: Any) -> tuple[int, int]:
    """Height and width of a size in a config: a number for a square, or both."""
    return (size, size) if isinstance(size, int) else tuple(size)
