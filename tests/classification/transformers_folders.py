"""Folders of small vision models of transformers with random weights and their image processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def transformers_folder(parent: Path, kind: str) -> Path:
    """A folder as `save_pretrained` of a model and its image processor writes it.

    Args:
        kind: `dinov2` (of 64 pixels; its processor crops 32 of 40), `siglip` and `clip` (with a text tower), `siglip_tower` and
            `clip_tower`, `vit`, `beit` and `registers` (DINOv2, with a head of three labels), `siglip2`, or `bert` (without image
            processor).
    """
    torch.manual_seed(5)
    model, processor = _pair(kind)
    folder = parent / kind
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def _pair(kind: str) -> tuple[Any, Any]:
    import transformers as t

    vision, crop = {**SHAPE, "image_size": 32, "intermediate_size": 48}, {"size": {"shortest_edge": 40}, "crop_size": SQUARE}
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {**vision, "num_labels": 3}
    pairs = {
        "dinov2": lambda: (
            t.Dinov2Model(t.Dinov2Config(**SHAPE, mlp_ratio=2, image_size=64)),
            t.BitImageProcessor(**crop, image_mean=MEAN, image_std=STD),
        ),
        "siglip": lambda: (
            t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)), t.SiglipImageProcessor(size=SQUARE)
        ),
        "siglip_tower": lambda: (t.SiglipVisionModel(t.SiglipVisionConfig(**vision)), t.SiglipImageProcessor(size=SQUARE)),
        "clip": lambda: (t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision)), t.CLIPImageProcessor(**crop)),
        "clip_tower": lambda: (t.CLIPVisionModel(t.CLIPVisionConfig(**vision)), t.CLIPImageProcessor(**crop)),
        "vit": lambda: (t.ViTForImageClassification(t.ViTConfig(**labels)), t.ViTImageProcessor(size=SQUARE)),
        "beit": lambda: (
            t.BeitForImageClassification(t.BeitConfig(**labels, use_relative_position_bias=True)),
            t.BeitImageProcessor(size={"height": 40, "width": 40}, crop_size=SQUARE, do_center_crop=True),
        ),
        "registers": lambda: (
            t.Dinov2WithRegistersForImageClassification(
                t.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, image_size=32, num_register_tokens=2, num_labels=3)
            ),
            t.BitImageProcessor(**crop, image_mean=MEAN, image_std=STD),
        ),
        "siglip2": lambda: (
            t.Siglip2VisionModel(t.Siglip2VisionConfig(**SHAPE, intermediate_size=48, num_patches=16)),
            t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
        ),
        "bert": lambda: (t.BertModel(t.BertConfig(**text)), None),
    }  # fmt: skip
    return pairs[kind]()
