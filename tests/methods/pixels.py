"""Slow references of pixel prompts, in numpy and Pillow, and small models for images of any shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.2, 0.4, 0.7), (0.3, 0.5, 0.25)


def tiny(height: int = 32, width: int = 48, classes: int = 10) -> nn.Module:
    """A ViT for rectangular images, with a different normalization per channel, whose head gives varied predictions."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": (height, width), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=classes, **shape)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": STD}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        model.patch_embed.proj.weight.normal_(std=0.3)
        model.head.weight.normal_()
    return model.eval()


def raw(count: int = 2, height: int = 32, width: int = 48, seed: int = 3) -> Tensor:
    """Images in [0, 1], (B, 3, H, W), each with different colors."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.rand(count, 3, 1, 1, generator=generator)
    return 0.8 * colors + 0.2 * torch.rand(count, 3, height, width, generator=generator)


def normal(pictures: Any) -> Tensor:
    """(pixel − mean) / std, channel by channel."""
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (MEAN, STD))
    return torch.from_numpy((np.asarray(pictures, dtype=np.float64) - mean) / std).float()


def shrunk(pictures: Tensor, size: tuple[int, int], filter: int) -> np.ndarray:
    """Every channel of every image as Pillow resizes it, in floating point."""
    height, width = size
    out = np.zeros((*pictures.shape[:2], height, width))
    for b, c in np.ndindex(*pictures.shape[:2]):
        image = Image.fromarray(pictures[b, c].numpy().astype(np.float32))
        out[b, c] = np.asarray(image.resize((width, height), filter))
    return out


def frame(values: Tensor, outer: tuple[int, int], inner: tuple[int, int]) -> np.ndarray:
    """(C, n) around a rectangle `inner`, pixel by pixel: rows above, left of it, right of it, below. NaN inside."""
    (height, width), (h, w) = outer, inner
    top, left = (height - h + 1) // 2, (width - w + 1) // 2
    out = np.full((len(values), height, width), np.nan)
    inside = [(r, c) for r in range(top, top + h) for c in range(left, left + w)]
    above = [(r, c) for r in range(top) for c in range(width)]
    before = [(r, c) for r in range(top, top + h) for c in range(left)]
    behind = [(r, c) for r in range(top, top + h) for c in range(left + w, width)]
    below = [(r, c) for r in range(top + h, height) for c in range(width)]
    places = [*above, *before, *behind, *below]
    assert len(places) == values.shape[1] == height * width - len(inside)
    for i, (r, c) in enumerate(places):
        out[:, r, c] = values[:, i].detach().numpy()
    return out


def seen(model: nn.Module, path: str, pictures: Tensor) -> Tensor:
    """Input of the module at `path` when the model is called with images."""
    kept: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        with torch.no_grad():
            model(pictures)
    finally:
        handle.remove()
    return kept[-1]


def stirred(attachment: Any, size: float = 1.0) -> None:
    """Perturb parameters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in attachment.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=size)
