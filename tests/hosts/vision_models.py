"""Uncommon vision models of transformers: with a text tower, with a pooler, gated, with absolute positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from veneer.hosts._transformers_vision import records


def with_text(cls: str) -> nn.Module:
    """A model of transformers with both towers."""
    import transformers

    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, cls).config_class(
        text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63, "projection_size": 24},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    return getattr(transformers, cls)(config)


def vision_model(family: str, **options: Any) -> nn.Module:
    """The small model of a family of transformers' vision models, with other options."""
    record = records()[family]
    return record.build(**{**next(iter(record.tiny.values())), **options})


def pooled_vit() -> nn.Module:
    """A ViT of transformers with the pooler and the mask token that its classifier lacks."""
    import transformers

    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTModel(transformers.ViTConfig(**tower, image_size=32, patch_size=8), use_mask_token=True)


UNCOMMON: dict[str, Callable[[], nn.Module]] = {
    "CLIPModel": partial(with_text, "CLIPModel"),
    "SiglipModel": partial(with_text, "SiglipModel"),
    "vit_pooler": pooled_vit,
    "dinov2_gated": partial(vision_model, "dinov2", use_swiglu_ffn=True),
    "beit_absolute": partial(
        vision_model, "beit", use_relative_position_bias=False, use_absolute_position_embeddings=True, use_mean_pooling=False
    ),
}
