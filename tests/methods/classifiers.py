"""Small CLIP classifiers, and CLIP's text side written out prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from veneer.hosts.clip_classifier import small_tokenizer
from veneer.injection.registry import hosts
from veneer.injection.sites import PromptSite
from veneer.injection.towers import sites
from veneer.models.clip_classifier import CLIPClassifier


def tiny(key: str = "vit") -> Any:
    torch.manual_seed(0)
    model = hosts.get("clip_classifier")().tiny()[key]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


def pictures(side: int = 16, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def token(word: str) -> int:
    return int(small_tokenizer([word])[0, 1])


def row(clip: Any, ids: Sequence[int | Tensor]) -> Tensor:
    """Rows (length, width) of a prompt of ids and vectors, padded with id 0."""
    text = getattr(clip, "text", clip)
    table = text.token_embedding.weight
    rows = [i if isinstance(i, Tensor) else table[i] for i in ids]
    return torch.stack([*rows, *[table[0]] * (text.context_length - len(ids))])


def encode(clip: Any, rows: Tensor, end: int) -> Tensor:
    """Normalized features (width,) of one prompt, which ends at position `end`."""
    text = getattr(clip, "text", clip)
    x = (rows + text.positional_embedding)[None]
    for block in text.transformer.resblocks:
        x = block(x, attn_mask=text.attn_mask)
    x = text.ln_final(x)[0, end] @ text.text_projection
    return x / x.norm()


def cosines(model: Any, image: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """exp(scale)·cos(f, w) with the same weights for all images, element by element."""
    f = model.clip.encode_image(image)
    scale = model.clip.logit_scale.exp()
    return torch.stack([torch.stack([scale * (x @ w) / (x.norm() * w.norm()) for w in weights]) for x in f])


def large(name: str, classes: Sequence[str] = ("cat", "dog")) -> nn.Module:
    """A CLIP of full size, without values."""
    with torch.device("meta"):
        clip = open_clip.create_model(name, load_weights=False, device="meta")
    return CLIPClassifier(clip, open_clip.get_tokenizer(name), classes)


def prompt_site(model: nn.Module) -> PromptSite:
    (site,) = (s for s in sites(model) if isinstance(s, PromptSite))
    return site


class InOrder:
    """Sampling of four labeled images in their order, again and again."""

    def at(self, number: int) -> tuple[int, int]:
        """Epoch and index of a sample."""
        return 0, number % 4


def labeled_batches(image: Tensor, labels: Tensor) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Images and labels of samples (epoch, index)."""

    def read(samples: Any) -> tuple[Tensor, Tensor]:
        indices = [index for _, index in samples]
        return image[indices], labels[indices]

    return read
