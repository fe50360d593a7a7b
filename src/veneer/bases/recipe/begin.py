"""Begin from weights that were packaged before: train them further, or on more than they saw."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from .captions import article
from .clip import NamedClip, ids_of
from .diffusion import Denoiser
from .package import BEGUN, TRAINING


def unpack(bases: Path, work: Path) -> None:
    """Lay tokenizer, autoencoder and what is known of their training where the stages look for them, unless they are there."""
    for source, target in ((bases / "shipped/tokenizer", work / "tokenizer"), (bases / "shipped/vae", work / "vae/model")):
        if not target.is_dir():
            shutil.copytree(source, target)
    if not (work / BEGUN).is_file():
        shutil.copyfile(bases / TRAINING, work / BEGUN)


def denoiser(model: Denoiser, bases: Path) -> None:
    """Give the denoiser the packaged weights."""
    model.unet.load_state_dict(_weights(bases / "shipped/unet/diffusion_pytorch_model.safetensors"))
    parts: Any = model.text
    parts.load_state_dict(_weights(bases / "shipped/text_encoder/model.safetensors"))


@torch.no_grad()
def named_clip(model: NamedClip, bases: Path, tokenizer: CLIPTokenizer, names: list[str]) -> None:
    """Give the CLIP the packaged weights; each prototype, which is not packaged, is what the text tower makes of its name."""
    weights = _weights(bases / "shipped_clip/model.safetensors")
    model.clip.load_state_dict(weights)
    model.log_scale.copy_(weights["logit_scale"])
    model.eval()
    features = model.clip.encode_text(ids_of(tokenizer, [article(name) for name in names]))
    model.prototypes.copy_(features / features.norm(dim=-1, keepdim=True) * features.shape[1] ** 0.5)
    model.train()


def _weights(file: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(file).items()}
