"""Small captioning models with random weights, saved as their libraries save them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "toy", "dog", "on", "red", "grass", "cat", "house", "small", "blue"]
TAGS = ("long_hair", "red_ball", "^_^", "outdoors")
SIDE = 32
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def blip(folder: Path) -> Path:
    """A BLIP that generates words of `WORDS`."""
    torch.manual_seed(0)
    text = {
        **LAYERS, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3,
        "pad_token_id": 0, "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {**LAYERS, "image_size": SIDE, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    return _save(BlipForConditionalGeneration(config), BlipImageProcessor(size={"height": SIDE, "width": SIDE}), folder)


def git(folder: Path) -> Path:
    """A GIT that generates words of `WORDS`."""
    torch.manual_seed(1)
    config = GitConfig(
        vision_config={**LAYERS, "image_size": SIDE, "patch_size": 8}, **LAYERS, vocab_size=len(WORDS), bos_token_id=2,
        eos_token_id=3, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    return _save(GitForCausalLM(config), CLIPImageProcessor(size=size, crop_size=size), folder)


def classifier(folder: Path, probabilities: tuple[float, ...], several: bool = True) -> Path:
    """A ViT with these probabilities of `TAGS` for every image."""
    values = torch.tensor(probabilities)
    config = ViTConfig(
        **LAYERS, image_size=SIDE, patch_size=8, id2label=dict(enumerate(TAGS)),
        problem_type="multi_label_classification" if several else "single_label_classification",
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(values.logit() if several else values.log())
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def wd_tagger(folder: Path, probabilities: tuple[float, ...]) -> Path:
    """A timm ViT with `selected_tags.csv` and these probabilities of a rating and `TAGS` for every image."""
    import timm
    from safetensors.torch import save_file

    name, sizes = "vit_tiny_patch16_224", {"img_size": SIDE, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model: Any = timm.create_model(name, num_classes=len(TAGS) + 1, **sizes)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(probabilities).logit())
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    preprocessing = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": name, "num_classes": len(TAGS) + 1, "model_args": sizes, "pretrained_cfg": preprocessing}
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        rows = [("tag_id", "name", "category", "count"), (0, "general", 9, 1), *((i, tag, 0, 1) for i, tag in enumerate(TAGS))]
        csv.writer(file).writerows(rows)
    return folder


def _save(model: Any, processor: Any, folder: Path) -> Path:
    for part in (model, processor, _tokenizer()):
        part.save_pretrained(folder)
    return folder
