"""A vision model of transformers as an image classifier with a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pooling = Literal["pooler", "class", "class_mean"]


class ImageClassifier(nn.Module):
    """Logits (batch, classes) of images: a linear head on pooled features of a vision model.

    The features are, by `pooling`: `pooler`, the model's `pooler_output` (SigLIP's attention pooling, CLIP's and DINOv3's class
    token, the mean of the patches of Swin and BEiT); `class`, the class token after the last norm (ViT, DeiT); `class_mean`, this
    and the mean of the patches, concatenated (DINOv2). All but SigLIP's, CLIP's and DINOv3's are those of transformers'
    `...ForImageClassification`.

    Args:
        backbone: a vision model of transformers. Its `config.image_size` is set to `size`.
        classes: number of classes.
        pooling: features of the head.
        size: (height, width) of the images in pixels.
        mean, std: normalization of the images.
        options: arguments of the model's forward pass, such as `interpolate_pos_encoding`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        pooling: Pooling,
        size: tuple[int, int],
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__()
        self.backbone, self.pooling, self.options = backbone, pooling, options
        self.mean, self.std = tuple(mean), tuple(std)
        config: Any = backbone.config
        config.image_size = size[0] if size[0] == size[1] else list(size)
        self.head = nn.Linear(_width(config, pooling), classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (batch, classes) of normalized images (batch, 3, height, width)."""
        logits: Tensor = self.head(self.features(pixel_values))
        return logits

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pooled features (batch, width) of normalized images (batch, 3, height, width)."""
        output = self.backbone(pixel_values, **self.options)
        if self.pooling == "pooler":
            pooled: Tensor = output.pooler_output
            return pooled
        token: Tensor = output.last_hidden_state[:, 0]
        if self.pooling == "class":
            return token
        config: Any = self.backbone.config
        patches = output.last_hidden_state[:, 1 + getattr(config, "num_register_tokens", 0) :]
        return torch.cat((token, patches.mean(1)), 1)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Enables gradient checkpointing of the model."""
        model: Any = self.backbone
        model.gradient_checkpointing_enable(**options)


def _width(config: Any, pooling: Pooling) -> int:
    """Width of the pooled features. Swin's config has it as `hidden_size` too."""
    return int(config.hidden_size) * (2 if pooling == "class_mean" else 1)
