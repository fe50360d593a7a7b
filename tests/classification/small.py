"""Small real models in folders, and a small separable image dataset."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

SIDE = 32
CLASSES = ("blue", "green", "red")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": SIDE, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
    ),
    "coatnet": (
        "coatnet_nano_rw_224",
        {"img_size": SIDE, "depths": [1, 1], "embed_dim": [32, 32], "stem_width": 8, "block_type": ["C", "T"]},
    ),
    "convnext": ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "kernel_sizes": 3, "ls_init_value": 1.0}),
}


def model_folder(parent: Path, kind: str) -> Path:
    """A timm folder with a small model of seeded random weights, as `timm.create_model("local-dir:…")` reads it."""
    import timm

    name, options = MODELS[kind]
    torch.manual_seed(5)
    model = timm.create_model(name, num_classes=7, **options)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.1)  # detectable if they change
            norm.weight.uniform_(0.5, 1.5)  # timm initializes the last norms of the blocks to zero, which blocks gradients
    folder = parent / kind
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    entry = {
        "input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
        "num_classes": 7, "classifier": model.pretrained_cfg["classifier"], "first_conv": model.pretrained_cfg["first_conv"],
    }  # fmt: skip
    config = {"architecture": name, "num_classes": 7, "model_args": options, "pretrained_cfg": entry}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def image_folder(parent: Path, count: int = 12, seed: int = 0) -> Path:
    """`count` noisy images of each of three colors, one folder per class."""
    generator = torch.Generator().manual_seed(seed)
    for channel, name in enumerate(reversed(CLASSES)):
        (parent / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 150, (SIDE, SIDE, 3), generator=generator)
            pixels[..., channel] += 100
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(parent / name / f"{number}.png")
    return parent


def color_table(folder: Path, count: int = 60) -> Path:
    """A CSV of noisy images; each label brightens its channel."""
    folder.mkdir(parents=True)
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    lines = ["path,labels"]
    for number in range(count):
        labels = [name for name in CLASSES if rng.random() < 0.4] or [rng.choice(CLASSES)]
        pixels = torch.randint(0, 150, (SIDE, SIDE, 3), generator=generator)
        for name in labels:
            pixels[..., ("red", "green", "blue").index(name)] += 100
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{';'.join(labels)}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder / "labels.csv"
