"""Initialization from packaged weights, to train them further or on more data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from ..folders import read_json
from .autoencoder import LATENT
from .clip import NamedClip, ids_of
from .data.captions import article
from .denoiser import Denoiser, noised
from .packaging import BEGUN, TRAINING

SILENT = 1e-3
"""Mean absolute input of a convolution below which it is dead."""


def unpack(bases: Path, work: Path) -> None:
    """Copies tokenizer, autoencoder and their training record to the work folder, unless they exist there.

    An autoencoder of fewer channels is not copied, because a new encoder is built from its latents; its record is dropped.
    """
    parts = {bases / "bundled/tokenizer": work / "tokenizer"}
    anew = read_json(bases / "bundled/vae/config.json")["latent_channels"] != LATENT
    if not anew:
        parts[bases / "bundled/vae"] = work / "vae/model"
    for source, target in parts.items():
        if not target.is_dir():
            shutil.copytree(source, target)
    if not (work / BEGUN).is_file():
        begun = read_json(bases / TRAINING)
        (work / BEGUN).write_text(json.dumps(_without_autoencoder(begun) if anew else begun, indent=2) + "\n")


def _without_autoencoder(training: dict[str, Any]) -> dict[str, Any]:
    kept = {stage: log for stage, log in training.items() if stage not in ("vae", "decoder", "begun")}
    return {**kept, "begun": _without_autoencoder(training["begun"])} if "begun" in training else kept


@torch.no_grad()
def denoiser(model: Denoiser, bases: Path) -> None:
    """Loads the packaged weights into the denoiser; missing channels become zero, missing tokens keep their initial values."""
    for part, file in ((model.unet, "unet/diffusion_pytorch_model"), (model.text, "text_encoder/model")):
        weights = _weights(bases / f"bundled/{file}.safetensors")
        for name, own in part.state_dict().items():
            given = weights[name]
            if given.shape != own.shape:
                own.zero_() if "conv" in name else None
                own[tuple(slice(0, size) for size in given.shape)] = given
            else:
                own.copy_(given)


@torch.no_grad()
def revive(model: Denoiser, latents: Tensor, ids: Tensor) -> list[str]:
    """Reinitializes dead residual blocks, whose second convolution has zero input; returns their names.

    Their time projections have driven every activation to zero. A block is initialized again, without the time embedding and
    with a zero second convolution, so that the output of the network does not change.

    Args:
        latents, ids: of training-like images; activations are measured at random timesteps.
    """
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (len(latents),), generator=generator)
    noisy, _ = noised(latents, torch.randn(latents.shape, generator=generator), t)
    heard: dict[str, float] = {}
    blocks = {name: block for name, block in model.unet.named_modules() if isinstance(block, ResnetBlock2D)}
    hooks = [
        block.conv2.register_forward_pre_hook(lambda _, args, name=name: heard.update({name: float(args[0].abs().mean())}))
        for name, block in blocks.items()
    ]
    model(noisy, t, ids)
    for hook in hooks:
        hook.remove()
    dead = [name for name in blocks if heard[name] < SILENT]
    for block in (blocks[name] for name in dead):
        for layer in (block.conv1, block.norm1, block.norm2):
            layer.reset_parameters()
        for zero in (block.conv2.weight, block.time_emb_proj.weight, block.time_emb_proj.bias):
            zero.zero_()
    return dead


@torch.no_grad()
def named_clip(model: NamedClip, bases: Path, tokenizer: CLIPTokenizer, names: list[str]) -> None:
    """Loads the packaged weights into the CLIP; the prototypes, which are not packaged, are initialized with text features."""
    weights = _weights(bases / "bundled_clip/model.safetensors")
    model.clip.load_state_dict(weights)
    model.log_scale.copy_(weights["logit_scale"])
    model.eval()
    features = model.clip.encode_text(ids_of(tokenizer, [article(name) for name in names]))
    model.prototypes.copy_(features / features.norm(dim=-1, keepdim=True) * features.shape[1] ** 0.5)
    model.train()


def _weights(file: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(file).items()}
