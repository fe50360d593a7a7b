"""A vision model of transformers as an image classifier with a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pooling = Literal["pooler", "class", "class_mean"]
POOLINGS: dict[str, Pooling] = {
    "vit": "class", "deit": "class", "dinov2": "class_mean", "dinov2_with_registers": "class_mean",
}  # fmt: skip
"""Model type of transformers to the features of its classifier; `pooler` for all others."""


def pooling_of(config: Any) -> Pooling:
    """The features of a classifier on a model with this config; see `ImageClassifier`."""
    return POOLINGS.get(config.model_type, "pooler")


class ImageClassifier(nn.Module):
    """Logits (batch, classes) of images: a linear head on pooled features of a vision model.

    The features, by the model's type:

    - `pooler`: its `pooler_output`. SigLIP's attention pooling; the class token after the last norm of CLIP and DINOv3; the mean
      of the patches of Swin; of BEiT also, or the class token, by its config.
    - `class`: the class token after the last norm. ViT, DeiT.
    - `class_mean`: this and the mean of the patches, concatenated. DINOv2.

    Those of ViT, DeiT, DINOv2, BEiT and Swin are what transformers' own classifiers read.

    Args:
        backbone: a vision model of transformers. Its `config.image_size` is set to `size`.
        classes: number of classes.
        size: (height, width) of the images in pixels.
        mean, std: normalization of the images.
        options: arguments of the model's forward pass, such as `interpolate_pos_encoding`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        size: tuple[int, int],
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__()
        config: Any = backbone.config
        self.backbone, self.pooling, self.options = backbone, pooling_of(config), options
        self.mean, self.std = tuple(mean), tuple(std)
        config.image_size = size[0] if size[0] == size[1] else list(size)
        # Swin's config has the width of its last stage as `hidden_size` too
        self.width: int = config.hidden_size * (2 if self.pooling == "class_mean" else 1)
        self.head: nn.Module = nn.Linear(self.width, classes)

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

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head with a new one, as timm's models do."""
        self.head = nn.Linear(self.width, num_classes)

    def activation_checkpointing_enable(self) -> None:
        """Enables gradient checkpointing of the model."""
        model: Any = self.backbone
        model.activation_checkpointing_enable()
