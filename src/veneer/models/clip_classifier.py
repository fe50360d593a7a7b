"""CLIP as an image classifier, with class embeddings of its text tower or a linear layer as the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

from .class_embeddings import ClassEmbeddings
from .tokenizer import PromptTokenizer, Tokenizer

TEMPLATES = ("a photo of a {}.",)


class TextHead(nn.Module):
    """logits = exp(logit_scale)·norm(f) norm(W)ᵀ for features f (batch, width), W = `texts(f)`; plus `logit_bias`, if any."""

    clip: Any

    def __init__(self, clip: nn.Module, texts: ClassEmbeddings) -> None:
        super().__init__()
        self.__dict__["clip"] = clip
        self.texts = texts
        self.in_features, self.out_features = features_of(clip), len(texts.names)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of features (batch, width)."""
        weights = normalize(self.texts(features), dim=-1)
        features = normalize(features, dim=-1)
        per_image = weights.dim() == 3
        cosines = (weights @ features.unsqueeze(-1)).squeeze(-1) if per_image else features @ weights.T
        logits = self.clip.logit_scale.exp() * cosines
        bias = getattr(self.clip, "logit_bias", None)
        return logits if bias is None else logits + bias


class CLIPClassifier(nn.Module):
    """Logits (batch, classes) of images, from an open_clip model.

    With `head="text"`: exp(logit_scale)·norm(f) norm(W)ᵀ, f the image's features, W for each class the mean over templates of
    its normalized text features. With `head="linear"`: a new linear layer on f.

    Args:
        clip: an open_clip model with an image and a text tower.
        tokenizer: as returned by `open_clip.get_tokenizer`.
        classes: names of the classes; `_` becomes a space in prompts.
        templates: prompt templates, with `{}` for the class name.
    Raises:
        TextError: prompts that are too long for the text tower; or a template without `{}`.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Tokenizer,
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        head: Literal["text", "linear"] = "text",
    ) -> None:
        super().__init__()
        if head not in ("text", "linear"):
            raise ValueError(f"CLIPClassifier: head is {head!r}; expected 'text' or 'linear'.")
        self.clip = clip
        self.head: nn.Module
        if head == "linear":
            self.head = nn.Linear(features_of(clip), len(classes))
        else:
            tower: Any = getattr(clip, "text", clip)
            words = PromptTokenizer(tokenizer, tower.context_length)
            self.head = TextHead(clip, ClassEmbeddings(clip, classes, templates, words))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width), preprocessed with the model's own transform."""
        logits: Tensor = self.head(self.encode_image(image))
        return logits

    def encode_image(self, image: Tensor) -> Tensor:
        """Image features (batch, width), not normalized."""
        encode: Any = self.clip.encode_image
        features: Tensor = encode(image, normalize=False)
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables gradient checkpointing in both towers."""
        clip: Any = self.clip
        clip.set_grad_checkpointing(enable)


def features_of(clip: Any) -> int:
    """Width of the shared image and text features."""
    projection = getattr(getattr(clip, "text", clip), "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if projection is not None:
        return int(projection.shape[1])
    return int(getattr(clip.text, "output_dim", 0) or clip.visual.output_dim)
