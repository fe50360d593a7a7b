"""Where control residuals are added in diffusers' UNets: skip and middle features, and features inside the encoder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from veneer.injection.sites import ResidualSite

from ._describe import TowerPart

CONTROL_OPTIONS = ("conditioning_channels", "conditioning_embedding_out_channels", "controlnet_conditioning_channel_order")


def residual_site(part: TowerPart, components: Mapping[str, Any] | None) -> ResidualSite:
    """The site of a whole UNet."""
    unet = part.module("")
    widths, strides = skips(unet)
    inner = inner_features(unet)
    names = [n for n in inspect.signature(type(unet).forward).parameters if n != "self"]
    return ResidualSite(
        name="residuals", role="residual", widths=widths, strides=strides,
        inner_widths=tuple(width for width, _ in inner), inner_strides=tuple(stride for _, stride in inner),
        pixels=_pixels((components or {}).get("vae")), arguments=tuple(names), skips="down_block_additional_residuals",
        middle="mid_block_additional_residual", inner="down_intrablock_additional_residuals", first="down_blocks.0",
        encoder=functools.partial(_encoder, dict(unet.config)), **part.labels,
    )  # fmt: skip


def _encoder(config: Mapping[str, Any], channels: int, widths: tuple[int, ...]) -> nn.Module:
    """A diffusers ControlNet for a UNet with the given config."""
    from diffusers import ControlNetModel

    known = set(inspect.signature(ControlNetModel.__init__).parameters) - set(CONTROL_OPTIONS)
    shared = {name: value for name, value in config.items() if name in known}
    net: Any = ControlNetModel(**shared, conditioning_channels=channels, conditioning_embedding_out_channels=widths)
    return cast(nn.Module, net)


def _pixels(vae: Any) -> int:
    """Pixels per latent position; 8 without an autoencoder."""
    return 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def skips(model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and strides of the skip features in the order of ControlNet residuals, then of the middle block."""
    unet: Any = model
    widths, strides, stride = [unet.conv_in.out_channels], [1], 1
    for block in unet.down_blocks:
        for resnet in block.resnets:
            widths.append(resnet.out_channels)
            strides.append(stride)
        if block.downsamplers is not None:
            stride *= 2
            widths.append(widths[-1])
            strides.append(stride)
    return (*widths, widths[-1]), (*strides, stride)


def inner_features(model: nn.Module) -> list[tuple[int, int]]:
    """Widths and strides of the features that T2I-Adapters change: of blocks with attention before downsampling, of others
    after it. If the first block has no attention, as in SDXL, the middle block's features are also changed."""
    unet: Any = model
    found, stride = [], 1
    for block in unet.down_blocks:
        reduced = stride * (2 if block.downsamplers is not None else 1)
        found.append((block.resnets[-1].out_channels, stride if _attends(block) else reduced))
        stride = reduced
    if unet.mid_block is not None and not _attends(unet.down_blocks[0]):
        found.append((found[-1][0], stride))
    return found


def _attends(block: Any) -> bool:
    return bool(getattr(block, "has_cross_attention", False))
