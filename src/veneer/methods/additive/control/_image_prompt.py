"""Maps an image to the tokens that an IP-Adapter attends to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from veneer.injection.errors import ConditionError


class ImageTokens(nn.Module):
    """LayerNorm(W e), split into `tokens`: (batch, several, width) to (batch, several, tokens, context)."""

    def __init__(self, width: int, context: int, tokens: int) -> None:
        super().__init__()
        self.count = tokens
        self.proj = nn.Linear(width, tokens * context)
        self.norm = nn.LayerNorm(context)

    def forward(self, embeds: Tensor) -> Tensor:
        """The tokens of each image."""
        found: Tensor = self.norm(self.proj(embeds).unflatten(-1, (self.count, -1)))
        return found


class Resampler(nn.Module):
    """Queries that attend to the patches and to themselves, `depth` times: (batch, several, patches, width) to tokens."""

    def __init__(self, width: int, context: int, tokens: int, dim: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, dim) / math.sqrt(dim))
        self.proj_in = nn.Linear(width, dim)
        self.proj_out = nn.Linear(dim, context)
        self.norm_out = nn.LayerNorm(context)
        heads = max(1, dim // 64)
        self.layers = nn.ModuleList(nn.ModuleList([Perceiver(dim, heads), _feed_forward(dim)]) for _ in range(depth))

    def forward(self, patches: Tensor) -> Tensor:
        """The tokens of each image."""
        x = self.proj_in(patches.flatten(0, 1))
        queries = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            queries = queries + attention(x, queries)
            queries = queries + feed_forward(queries)
        found: Tensor = self.norm_out(self.proj_out(queries))
        return found.unflatten(0, patches.shape[:2])


class Perceiver(nn.Module):
    """Attention of the queries to the patches and to themselves, with heads of 64 channels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, 64 * heads, bias=False)
        self.to_kv = nn.Linear(dim, 128 * heads, bias=False)
        self.to_out = nn.Linear(64 * heads, dim, bias=False)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        """(batch, patches, dim) and (batch, tokens, dim) to the update of the queries."""
        normed = self.norm2(queries)
        k, v = self.to_kv(torch.cat([self.norm1(x), normed], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, 64)).transpose(1, 2) for t in (self.to_q(normed), k, v))
        found: Tensor = self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


def _feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))


def image_embeddings(conditions: Mapping[str, Any], pipeline: Any, patches: bool) -> tuple[Tensor, Tensor]:
    """(images, several, …) embeddings of the given images, and of the unconditional half of the batch.

    Args:
        patches: embeds all patches, (…, patches, width), instead of the whole image, (…, width).
    Raises:
        ConditionError: both or neither of `image` and `embeds`, no image encoder, or a wrong shape.
    """
    image, encoded, negative = (conditions.get(name) for name in ("image", "embeds", "negative"))
    if (image is None) == (encoded is None):
        message = "ip_adapter: expected exactly one of condition(image=…) and condition(embeds=…)."
        both = tuple(name for name in ("image", "embeds") if conditions.get(name) is not None)
        raise ConditionError(message, where="ip_adapter", given=both, expected=("image", "embeds"))
    if image is not None:
        encoded, negative = _encode_images(image, pipeline, patches)
    embeds = _check_shape(encoded, patches, "embeds")
    return embeds, torch.zeros_like(embeds) if negative is None else _check_shape(negative, patches, "negative")


def _check_shape(value: Any, patches: bool, name: str) -> Tensor:
    least = 3 if patches else 2
    if not isinstance(value, Tensor) or value.dim() not in (least, least + 1):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        shape = "(images, patches, width)" if patches else "(images, width)"
        raise ConditionError(
            f"ip_adapter: {name}: got {got}; expected {shape}, or an additional dimension after the first for several per "
            "prompt.",
            where=name,
            given=got,
            expected=shape,
        )
    return value if value.dim() == least + 1 else value[:, None]


@torch.no_grad()
def _encode_images(image: Any, pipeline: Any, patches: bool) -> tuple[Tensor, Tensor]:
    """Embeds with the pipeline's encoder: the projected embedding and zeros; or its penultimate layer, also for a zero image."""
    encoder, extractor = (getattr(pipeline, name, None) for name in ("image_encoder", "feature_extractor"))
    if encoder is None or extractor is None:
        raise ConditionError(
            "ip_adapter: the pipeline has no image_encoder and feature_extractor to embed images. Load it with both, or "
            "pass embeddings: condition(embeds=…).",
            where="pipeline",
            expected=("image_encoder", "feature_extractor"),
        )
    prompts = image if isinstance(image, (list, tuple)) else [image]
    several = [each if isinstance(each, (list, tuple)) else [each] for each in prompts]
    if len({len(each) for each in several}) != 1:
        message = "ip_adapter: prompts have different numbers of images; expected the same number for each."
        raise ConditionError(message, where="image", given=tuple(len(each) for each in several))
    flat = [picture for each in several for picture in each]
    pixels = extractor(flat, return_tensors="pt").pixel_values.to(encoder.device, encoder.dtype)
    if not patches:
        found = encoder(pixels).image_embeds
        negative = torch.zeros_like(found)
    else:
        found, negative = (encoder(p, output_hidden_states=True).hidden_states[-2] for p in (pixels, torch.zeros_like(pixels)))
    shape = (len(several), len(several[0]))
    return found.unflatten(0, shape), negative.unflatten(0, shape)


def read_masks(masks: Any, pictures: int, several: int) -> Tensor:
    """Masks (images, several, height, width) in 0 … 1, from PIL images or tensors.

    Raises:
        ConditionError: not one mask per image, or masks of different sizes.
    """
    several_masks = masks if isinstance(masks, (list, tuple)) else [masks]
    read = [_read_mask(each) for each in several_masks]
    if len({m.shape for m in read}) != 1 or len(read) not in (several, pictures * several):
        message = f"ip_adapter: {len(read)} masks; expected {several} of the same size, one per image of a prompt."
        raise ConditionError(message, where="mask", given=len(read), expected=several)
    found = torch.stack(read).unflatten(0, (-1, several))
    return found.expand(pictures, -1, -1, -1)


def _read_mask(each: Any) -> Tensor:
    if isinstance(each, Image.Image):
        return torch.from_numpy(np.asarray(each.convert("L"), dtype=np.float32) / 255)
    if isinstance(each, Tensor) and each.squeeze().dim() == 2:
        return each.squeeze().float()
    message = f"ip_adapter: a mask is a {type(each).__name__}; expected an image or a tensor (height, width)."
    raise ConditionError(message, where="mask", given=type(each).__name__)


def resize_masks(mask: Tensor, length: int) -> Tensor:
    """Resizes masks (batch, several, height, width) to weights of `length` positions, (batch, several, length), row by row."""
    height, width = mask.shape[-2:]
    rows = int(math.sqrt(length * height / width))
    rows += length % rows != 0
    columns = length // rows
    found = interpolate(mask.float(), (rows, columns), mode="bicubic").flatten(2)
    return nn.functional.pad(found, (0, length - rows * columns))
