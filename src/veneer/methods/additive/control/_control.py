"""Parts shared by methods conditioned on a control image."""

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
    """A method conditioned on `image`: one image for all samples, or one per prompt."""

    needs: ClassVar[tuple[Need, ...]] = (Need(ResidualSite),)
    default: ClassVar[tuple[str, ...]] = ("residual",)
    conditions: ClassVar[tuple[str, ...]] = ("image",)
    channels: int

    def parse_conditions(self, sites: Sequence[Site], pipeline: Any, **conditions: Any) -> ParsedConditions:
        """The images as (images, channels, height, width) in 0 … 1, and the other conditions."""
        if conditions.get("image") is None:
            message = f"{self.name}: no image was given; expected condition(image=…), an image or a list of images."
            raise ConditionError(message, where=self.name, expected=("image",))
        options = {key: value for key, value in conditions.items() if key != "image"}
        return {"image": read_images(conditions["image"], self.channels, self.name)}, options

    def example(self, adapters: Sequence[tuple[Site, Adapter]], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """A noise image."""
        site, _ = adapters[0]
        assert isinstance(site, ResidualSite)
        latent: Tensor = inputs[site.arguments[0]]
        side = [site.pixels * length for length in latent.shape[-2:]]
        noise = torch.rand(1, self.channels, *side, generator=torch.Generator().manual_seed(5))
        return {"image": noise.to(latent.device)}


def read_images(images: Any, channels: int, name: str) -> Tensor:
    """Images (images, channels, height, width) in 0 … 1, float32.

    Args:
        given: a PIL image, a tensor (channels, height, width) or (images, channels, height, width) in 0 … 1, or a list of
            them.
    Raises:
        ConditionError: wrong channels, values outside 0 … 1, or images of different sizes.
    """
    several = images if isinstance(images, (list, tuple)) else [images]
    read = [t for each in several for t in _read(each, channels, name)]
    if len({t.shape for t in read}) != 1:
        sizes = sorted({f"{t.shape[-1]}×{t.shape[-2]}" for t in read})
        message = f"{name}: images of size {', '.join(sizes) or 'none'}; expected at least one, all of the same size."
        raise ConditionError(message, where=name, given=tuple(sizes), expected=1)
    found = torch.stack(read).float()
    if not found.min() >= 0 or not found.max() <= 1:
        message = f"{name}: values from {found.min():.3g} to {found.max():.3g}; expected tensors in 0 … 1."
        raise ConditionError(message, where=name, given=(found.min().item(), found.max().item()), expected=(0, 1))
    return found


def _read(each: Any, channels: int, name: str) -> list[Tensor]:
    if isinstance(each, Image.Image):
        if channels not in MODES:
            message = f"{name}: was built for {channels} channels, which no image mode has. Pass tensors."
            raise ConditionError(message, where=name, expected=channels)
        values = torch.from_numpy(np.asarray(each.convert(MODES[channels]), dtype=np.float32) / 255)
        each = values.reshape(*values.shape[:2], channels).permute(2, 0, 1)
    if not isinstance(each, Tensor) or each.dim() not in (3, 4):
        shape = tuple(each.shape) if isinstance(each, Tensor) else ""
        raise ConditionError(
            f"{name}: got a {type(each).__name__} {shape}; expected images or tensors (channels, height, width).",
            where=name,
            given=shape or type(each).__name__,
        )
    if each.shape[-3] != channels:
        message = f"{name}: got {each.shape[-3]} channels; it was built for {channels}."
        raise ConditionError(message, where=name, given=each.shape[-3], expected=channels)
    return [each] if each.dim() == 3 else list(each)
