"""From checkpoints to the folders that ship: half precision, safetensors, nothing that only veneer could read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from . import clip, denoiser
from .data import example_images
from .data.training_data import World

LIMIT = 60_000_000
"""Bytes that all bundled weights may take together."""

TRAINING = "bundled/training.json"
"""How far the trainings were when the weights were packaged."""

BEGUN = "begun.json"
"""The same of the weights that a work folder began from."""


def pipeline(world: World) -> Any:
    """The pipeline with the averaged weights of the latest checkpoint, in float32."""
    tokens, vae = world.tokenizer, world.folder / "vae"
    model = denoiser.Denoiser(len(tokens), tokens.bos_token_id, tokens.eos_token_id)
    model.load_state_dict(without_tokens(averaged(world.folder / "unet"), len(tokens)))
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(next(f for f in (vae / "refined", vae / "model") if f.is_dir())),
        text_encoder=model.text.eval(),
        tokenizer=tokens,
        unet=model.unet.eval(),
        scheduler=denoiser.schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    """The EMA weights of a run's checkpoint."""
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")["ema"]
    return state


def without_tokens(weights: dict[str, torch.Tensor], vocabulary: int) -> dict[str, torch.Tensor]:
    """The weights of a denoiser without the tokens of single things, which come after the vocabulary."""
    return {name: value[:vocabulary] if "token_embedding" in name else value for name, value in weights.items()}


def write_pipeline(world: World, folder: Path) -> None:
    """Write the Stable Diffusion folder; its preset and README, if there are any, stay."""
    pipe = pipeline(world)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads, beside the tokenizer.json of transformers 5
        shutil.copyfile(world.folder / "tokenizer" / name, folder / "tokenizer" / name)
    for config in folder.glob("*/config.json"):
        _plain_config(config)


def write_clip(world: World, folder: Path) -> None:
    """Write the CLIP folder, which open_clip and timm read; a README that is there stays."""
    weights = averaged(world.folder / "clip")
    model = clip.NamedClip(len(world.tokenizer), *(len(weights[name]) for name in ("prototypes", "things")))
    model.load_state_dict(weights)
    clip.save(model, world.tokenizer, folder)


def _plain_config(config: Path) -> None:
    """Leave out where a part was loaded from, and load it in float32 unless asked otherwise.

    transformers 5 takes the file's precision, diffusers float32: unasked, the halves of a pipeline would not fit together.
    """
    value = json.loads(config.read_text())
    if isinstance(value, dict):
        value.pop("_name_or_path", None)
        value.update({key: "float32" for key in ("dtype", "torch_dtype") if key in value})
        config.write_text(json.dumps(value, indent=2) + "\n")


def training(world: World) -> dict[str, Any]:
    """Steps of the checkpoints, and the UNet's last v-errors on watched images, from the logs; `begun` says what came before."""
    last: dict[str, Any] = {}
    logs = {stage: world.folder / stage / "log.jsonl" for stage in ("clip", "unet")}
    logs["decoder"] = world.folder / "vae" / "decoder" / "log.jsonl"
    for stage, log in ((stage, log) for stage, log in logs.items() if log.is_file()):
        line = log.read_text().strip().splitlines()[-1]
        last[stage] = {k: v for k, v in json.loads(line).items() if k in ("step", "loss") or split_key(k)}
    if (world.folder / BEGUN).is_file():
        last["begun"] = json.loads((world.folder / BEGUN).read_text())
    return last


def split_key(key: str) -> tuple[str, int] | None:
    """Watched images and timestep of a v-error in a log: ("", 500) of "v500", ("photo", 500) of "photo v500", else None."""
    found = re.fullmatch(r"(?:(\w+) )?v(\d+)", key)
    return (found[1] or "", int(found[2])) if found else None


def weight(*folders: Path) -> int:
    """Bytes of all safetensors in the folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))


def write(world: World, bases: Path) -> None:
    """Write both folders and the example pictures under `bases`.

    Raises:
        ValueError: the weights are over the limit.
    """
    write_pipeline(world, bases / "bundled")
    write_clip(world, bases / "bundled_clip")
    (bases / TRAINING).write_text(json.dumps(training(world), indent=2) + "\n")
    example_images.write(world.icons, bases / "examples")
    for file in bases.rglob("*.safetensors"):
        file.chmod(0o644)  # transformers and safetensors leave them to the owner alone
    size = weight(bases / "bundled", bases / "bundled_clip")
    if size > LIMIT:
        raise ValueError(f"{bases}: the weights take {size / 1e6:.1f} MB; at most {LIMIT / 1e6:.0f} MB ship. Narrow the UNet.")
