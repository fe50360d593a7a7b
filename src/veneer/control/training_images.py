"""The pictures that control is learnt from: photos, photos with maps, or what the base draws; and those that measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from veneer import base_models
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError
from veneer.training.data.class_images import prior_pictures
from veneer.training.data.photo_folder import Photo, find_photos
from veneer.training.families import Family
from veneer.training.loop.seeds import generator

from .config import ControlConfig
from .image_pairs import find_pairs


@dataclass(frozen=True)
class Pictures:
    """Photos with captions, to train on and held out.

    Args:
        guides: photo's path to the path of its map, for maps that someone made.
        notes: what was left out or looks wrong.
    """

    train: tuple[Photo, ...]
    held: tuple[Photo, ...]
    guides: dict[Path, Path]
    notes: tuple[str, ...] = ()


def open_pictures(config: ControlConfig, kind: Family, out: Path, told: Callable[[int, int], None] | None = None) -> Pictures:
    """The pictures of a run; where no data is given, the base draws them into `out/drawn` first.

    Raises:
        DataError: photos that cannot be used. VeneerError: `pairs` without data, too few pictures, or no captions.
    """
    notes: tuple[str, ...] = ()
    guides: dict[Path, Path] = {}
    if config.data is None:
        if config.condition == "pairs":
            raise OptionError("condition 'pairs' needs a folder with photos and their maps.", option="data", expected="pairs")
        photos = drawn(config, kind, out / "drawn", told)
    elif config.condition == "pairs":
        found = find_pairs(config.data)
        photos, notes = [pair.photo for pair in found.pairs], found.notes
        guides = {pair.photo.path: pair.map.path for pair in found.pairs}
    else:
        photos = find_photos(config.data)
    if config.template:
        photos = [photo if photo.caption else replace(photo, caption=config.template) for photo in photos]
    count = max(1, round(config.validation * len(photos))) if config.validation else 0
    if len(photos) - count < 1:
        message = f"{len(photos)} pictures, of which {count} would be held back; at least 2 are needed."
        raise VeneerError(message, where="photos", given=len(photos), expected=2)
    order = torch.randperm(len(photos), generator=generator(config.seed, "held")).tolist()
    held = {order[i] for i in range(count)}
    return Pictures(
        tuple(p for i, p in enumerate(photos) if i not in held), tuple(photos[i] for i in order[:count]), guides, notes
    )


def drawn(config: ControlConfig, kind: Family, folder: Path, told: Callable[[int, int], None] | None = None) -> list[Photo]:
    """Pictures that the base draws of the things that it knows. Their captions name the thing only: where it is, how large and
    before what, is left for the map to say.

    Raises:
        VeneerError: the base's preset names no things.
    """
    preset = base_models.preset(config.base)
    if not preset.things or not preset.scenes:
        raise OptionError(
            f"no data, and {config.base} names no things that it could draw. Give a folder of photos with captions.",
            option="data",
            given=None,
        )
    things = [_one(preset.things, config.seed, "thing", i) for i in range(config.generated_images)]
    prompts = [_one(preset.scenes, config.seed, "scene", i).replace("{thing}", thing) for i, thing in enumerate(things)]
    settings = {"num_inference_steps": preset.steps, "guidance_scale": preset.guidance_scale}
    kind.pipe.set_progress_bar_config(disable=True)
    paths = prior_pictures(kind, folder, prompts, config.generated_images, config.seed, batch=16, progress=told, **settings)
    captions = [preset.templates[0].replace("{concept}", thing) for thing in things]
    return [replace(find_photos(path)[0], caption=caption) for path, caption in zip(paths, captions, strict=True)]


def _one(words: Sequence[str], seed: int, what: str, index: int) -> str:
    """One of some words, drawn by the seed."""
    return words[int(torch.randint(len(words), (), generator=generator(seed, what, index)))]
