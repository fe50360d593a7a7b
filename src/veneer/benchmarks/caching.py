"""Training from a few photos with and without caches of latents and text embeddings, all else equal.

The timing covers everything after loading the base: from reading the photos to the last step. `cold caches` start empty, in
memory and on disk; `warm caches` read the files of an earlier run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veneer.base_models.loading import find
from veneer.training import attach_methods, param_groups, prepare_base
from veneer.training.data.captions import Captions
from veneer.training.data.dataset import PhotoDataset, find_photos
from veneer.training.data.latent_cache import Cache
from veneer.training.families import family
from veneer.training.loop.config import TrainConfig
from veneer.training.loop.trainer import Trainer
from veneer.training.objective.denoising_loss import DenoisingLoss

from .interleaved_timing import Contender, Contest
from .shapes import BenchError, Shape

_IMAGE_SIDE = 512


def contests(pipe: Any, photos: Path | None, shape: Shape, rank: int, seed: int, scratch: Path) -> list[Contest]:
    """One contest on a loaded pipeline.

    Args:
        pipe: the pipeline. It is frozen, because trainable encoders are not cached; otherwise each run leaves it unchanged.
        photos: folder of images; None generates `shape.photos` images in `scratch`.
        scratch: folder for images and caches.
    """
    prepare_base.freeze(pipe)
    folder = photos if photos is not None else generate_images(scratch / "photos", shape.photos, seed)
    warm = scratch / "warm"

    def job(cache: Callable[[], Cache | None]) -> Callable[[Any], float]:
        return lambda _: train(pipe, folder, cache(), shape, rank, seed)

    ways = {
        "no caches": job(lambda: None),
        "cold caches": job(lambda: Cache(tempfile.mkdtemp(dir=scratch))),
        "warm caches": job(lambda: Cache(warm)),
    }
    ways["warm caches"](None)
    side = shape.resolution or family(pipe).resolution
    what = f"{type(pipe).__name__}, {len(find_photos(folder))} photos at {side}×{side}, {shape.steps} steps, rank {rank}"
    pairs = (("cold caches", "no caches"), ("warm caches", "no caches"))
    return [Contest("few-photo job", what, tuple(Contender(name, run) for name, run in ways.items()), pairs)]


def check(base: str, photos: Path | None) -> None:
    """Checks that the base and the photos exist, before the other rows run for minutes.

    Args:
        base: `tiny`, or what `veneer.base_models.load` takes; names on the hub are not looked up.
        photos: a folder; None if they are generated.
    Raises:
        VeneerError: neither a folder nor a hub name, or no photos.
    """
    if base != "tiny":
        find(base)
    if photos is not None:
        find_photos(photos)


def load(base: str) -> Any:
    """The pipeline: `tiny`, or what `veneer.base_models.load` takes."""
    if base == "tiny":
        from veneer.testing.pipelines import tiny_pipeline

        return tiny_pipeline("sd")
    from veneer import base_models

    return base_models.load(base)


def train(pipe: Any, photos: Path, cache: Cache | None, shape: Shape, rank: int, seed: int) -> float:
    """Trains a LoRA on a folder of photos and detaches it; returns the last loss.

    Raises:
        BenchError: the given cache was not used.
    """
    kind = family(pipe)
    methods = attach_methods.build_methods("lora", {"lora": {"rank": rank}}, "", "")
    attached = attach_methods.attach_all(pipe, methods, {}, text_encoder=False, seed=seed)
    try:
        data = PhotoDataset(
            find_photos(photos), shape.resolution or kind.resolution, kind.multiple, seed, captions=Captions(concept="<thing>")
        )
        loss = DenoisingLoss(kind, data, seed, samples=1, cache=cache)
        named = param_groups.named_parameters(attached)
        config = TrainConfig(steps=shape.steps, seed=seed, tracker="none")
        result = Trainer(config, [{"params": list(named.values())}], loss, named).fit()
    finally:
        for attachment in attached:
            attachment.detach()
    if cache is not None and not cache.hits + cache.misses:
        raise BenchError("bench: the few-photo training did not use its cache")
    return result.losses[-1]


def generate_images(folder: Path, count: int, seed: int) -> Path:
    """Writes smooth random images as PNG files, for machines without photos."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        coarse = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(coarse.numpy()).resize((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.png")
    return folder
