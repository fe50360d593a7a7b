"""Applies convolutions to the patches of features in any layout, and to each prefix token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.functional.grids import grid_of
from veneer.injection.errors import HostChanged
from veneer.injection.sites import BranchSite


def convolve_patches(
    convolution: Callable[[Tensor], Tensor], z: Tensor, site: BranchSite, center: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A convolution of the patch grid, with each prefix token as an image of one pixel.

    Args:
        convolution: maps (batch, channels, height, width) to the same shape.
        z: features in the site's layout, with any number of channels.
        center: maps prefix tokens (batch, tokens, channels) as `convolution` maps images of one pixel, if this is cheaper.
    Raises:
        HostChanged: the patches form no grid of the model's aspect ratio.
    """
    if site.layout == "NCHW":
        return convolution(z)
    if site.layout == "NHWC":
        return _channels_last(convolution, z)
    head, patches = z[:, : site.prefix_tokens], z[:, site.prefix_tokens :]
    patches = _channels_last(convolution, patches.unflatten(1, _grid(patches.shape[1], site))).flatten(1, 2)
    if not site.prefix_tokens:
        return patches
    if center is not None:
        return torch.cat([center(head), patches], 1)
    pixels = convolution(head.flatten(0, 1)[:, :, None, None])
    return torch.cat([pixels.flatten(1).unflatten(0, (-1, site.prefix_tokens)), patches], 1)


def _channels_last(convolution: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return convolution(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _grid(tokens: int, site: BranchSite) -> tuple[int, int]:
    assert site.grid is not None
    try:
        return grid_of(tokens, site.grid)
    except ValueError as error:
        raise HostChanged(f"{site.name}: {error}", where=site.name, given=tokens, expected=site.grid) from error
