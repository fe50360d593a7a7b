"""Packaging of checkpoints as base model folders: half precision, safetensors, in diffusers' and open_clip's layouts."""

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
"""Upper limit of the size of all bundled weights, in bytes."""

TRAINING = "bundled/training.json"
"""Training steps of the packaged weights."""

BEGUN = "begun.json"
"""Training steps of the weights that a work folder was initialized from."""


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
    """The weights of a denoiser without the instance tokens, which follow the vocabulary."""
    return {name: value[:vocabulary] if "token_embedding" in name else value for name, value in weights.items()}


def write_pipeline(world: World, folder: Path) -> None:
    """Writes the Stable Diffusion folder; an existing preset and README are kept."""
    pipe = pipeline(world)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):  # for transformers 4; transformers 5 reads tokenizer.json
        shutil.copyfile(world.folder / "tokenizer" / name, folder / "tokenizer" / name)
    for config in folder.glob("*/config.json"):
        _plain_config(config)


def write_clip(world: World, folder: Path) -> None:
    """Writes the CLIP folder, which open_clip and timm read; an existing README is kept."""
    weights = averaged(world.folder / "clip")
    model = clip.NamedClip(len(world.tokenizer), *(len(weights[name]) for name in ("prototypes", "things")))
    model.load_state_dict(weights)
    clip.save(model, world.tokenizer, folder)


def _plain_config(config: Path) -> None:
    """Removes the source path of a component, and sets its default dtype to float32.

    By default transformers 5 loads in the file's dtype and diffusers in float32, so that a pipeline would have mixed dtypes.
    """
    value = json.loads(config.read_text())
    if isinstance(value, dict):
        value.pop("_name_or_path", None)
        value.update({key: "float32" for key in ("dtype", "torch_dtype") if key in value})
        config.write_text(json.dumps(value, indent=2) + "\n")


def training(world: World) -> dict[str, Any]:
    """Steps and last v-errors on validation images, from the logs; `begun` has those of earlier runs."""
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
    """Validation images and timestep of a v-error key: ("", 500) of "v500", ("photo", 500) of "photo v500", else None."""
    found = re.fullmatch(r"(?:(\w+) )?v(\d+)", key)
    return (found[1] or "", int(found[2])) if found else None


def weight(*folders: Path) -> int:
    """Size of all safetensors in the folders, in bytes."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))


def write(world: World, bases: Path) -> None:
    """Writes both folders and the example images under `bases`.

    Raises:
        ValueError: the weights are over the limit.
    """
    write_pipeline(world, bases / "bundled")
    write_clip(world, bases / "bundled_clip")
    (bases / TRAINING).write_text(json.dumps(training(world), indent=2) + "\n")
    example_images.write(world.icons, bases / "examples" / "octopus")
    for file in bases.rglob("*.safetensors"):
        file.chmod(0o644)  # transformers and safetensors write files that only the owner can read
    size = weight(bases / "bundled", bases / "bundled_clip")
    if size > LIMIT:
        raise ValueError(f"{bases}: weights of {size / 1e6:.1f} MB; expected at most {LIMIT / 1e6:.0f} MB. Use a narrower UNet.")
