"""What methods that are given a picture to follow have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from veneer.injection.errors import ConditionError
from veneer.injection.method import Adapter, Method, Need, ParsedConditions
from veneer.injection.sites import ResidualSite, Site

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Controlled(Method):
    """A method that is given `image`: one picture for all samples, or one for each prompt."""

    needs: ClassVar[tuple[Need, ...]] = (Need(ResidualSite),)
    default: ClassVar[tuple[str, ...]] = ("residual",)
    conditions: ClassVar[tuple[str, ...]] = ("image",)
    channels: int

    def parse_conditions(self, sites: Sequence[Site], pipeline: Any, **conditions: Any) -> ParsedConditions:
        """The pictures as (pictures, channels, height, width) in 0 … 1, and what else was given."""
        if conditions.get("image") is None:
            message = f"{self.name}: no image was given; expected condition(image=…), a picture or a list of them."
            raise ConditionError(message, where=self.name, expected=("image",))
        options = {key: value for key, value in conditions.items() if key != "image"}
        return {"image": pictures(conditions["image"], self.channels, self.name)}, options

    def example(self, adapters: Sequence[tuple[Site, Adapter]], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """A picture of noise."""
        site, _ = adapters[0]
        assert isinstance(site, ResidualSite)
        latent: Tensor = inputs[site.arguments[0]]
        side = [site.pixels * length for length in latent.shape[-2:]]
        drawn = torch.rand(1, self.channels, *side, generator=torch.Generator().manual_seed(5))
        return {"image": drawn.to(latent.device)}


def pictures(given: Any, channels: int, name: str) -> Tensor:
    """Pictures (pictures, channels, height, width) in 0 … 1, single precision.

    Args:
        given: a PIL picture, a tensor (channels, height, width) or (pictures, channels, height, width) in 0 … 1, or a list of
            such.
    Raises:
        ConditionError: other channels, values outside of 0 … 1, or pictures of different sizes.
    """
    several = given if isinstance(given, (list, tuple)) else [given]
    read = [t for each in several for t in _read(each, channels, name)]
    if len({t.shape for t in read}) != 1:
        sizes = sorted({f"{t.shape[-1]}×{t.shape[-2]}" for t in read})
        message = f"{name}: pictures of {', '.join(sizes) or 'no'} size; expected at least one, all of one size."
        raise ConditionError(message, where=name, given=tuple(sizes), expected=1)
    found = torch.stack(read).float()
    if not found.min() >= 0 or not found.max() <= 1:
        message = f"{name}: values from {found.min():.3g} to {found.max():.3g}; expected tensors in 0 … 1."
        raise ConditionError(message, where=name, given=(found.min().item(), found.max().item()), expected=(0, 1))
    return found


def _read(each: Any, channels: int, name: str) -> list[Tensor]:
    if isinstance(each, Image.Image):
        if channels not in MODES:
            message = f"{name}: was made for {channels} channels, which no picture has; give tensors."
            raise ConditionError(message, where=name, expected=channels)
        values = torch.from_numpy(np.asarray(each.convert(MODES[channels]), dtype=np.float32) / 255)
        each = values.reshape(*values.shape[:2], channels).permute(2, 0, 1)
    if not isinstance(each, Tensor) or each.dim() not in (3, 4):
        shape = tuple(each.shape) if isinstance(each, Tensor) else ""
        raise ConditionError(
            f"{name}: got a {type(each).__name__} {shape}; expected pictures or tensors (channels, height, width).",
            where=name,
            given=shape or type(each).__name__,
        )
    if each.shape[-3] != channels:
        message = f"{name}: {each.shape[-3]} channels were given; it was made for {channels}."
        raise ConditionError(message, where=name, given=each.shape[-3], expected=channels)
    return [each] if each.dim() == 3 else list(each)
