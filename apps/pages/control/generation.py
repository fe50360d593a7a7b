"""Generation with control adapters: condition images, and images with and without control."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from veneer.control.generation import condition_argument, condition_inputs, condition_of
from veneer.control.maps import maps
from veneer.control.maps.resize import resize_map
from veneer.control.maps.sketch import sketch_map
from veneer.injection import OptionError, VeneerError
from veneer.training.report.png_metadata import save_png

from ...context import Context
from ...generator import AdapterUse
from ...limits import LIMITS
from ...workspace import Workspace, printable
from ..shared.generation_request import (
    MAX_STRENGTH,
    GalleryItem,
    GenerationRequest,
    generate_batches,
    number,
    save_image,
    truncate_prompts,
)
from ..shared.images import load_photo, load_sketch, new_folder

SOURCES = {"A sketch": "sketch", "A photo (converted to a map)": "photo", "A ready map": "map"}
IMAGE = "image"
"""Condition type of adapters that use the image itself instead of a map."""


@dataclass(frozen=True)
class ControlAdapter:
    """A control adapter file and its condition type; None if the file does not state it."""

    file: Path
    condition: str | None


@dataclass(frozen=True)
class ConditionInput:
    """User input to condition on: `source` (see `SOURCES`), a sketch, and a photo file."""

    source: str
    sketch: bytes | str | None = None
    photo: str | None = None


def control_adapters(workspace: Workspace) -> dict[str, ControlAdapter]:
    """Control adapters of a user, by name."""
    found = {}
    for name, file in workspace.all_adapters().items():
        try:
            kind = condition_argument(file)
        except (VeneerError, OSError):
            continue
        if kind:
            found[name] = ControlAdapter(file, IMAGE if kind == "embeds" else condition_of(file))
    return found


def control_adapter(workspace: Workspace, name: Any, condition: Any = None) -> ControlAdapter:
    """Finds a control adapter by name; `condition` is used if the file does not state its type.

    Raises:
        VeneerError: no adapter is chosen, or it is unknown or not a control adapter.
    """
    if not name:
        message = "no control adapter is chosen. Choose one, or train one below."
        raise OptionError(message, option="control", given=None)
    workspace.adapter(str(name))
    found = control_adapters(workspace).get(str(name))
    if found is None:
        message = f"{printable(str(name))} is not a control adapter. Use it on the page Generate."
        raise OptionError(message, option="control", given=str(name))
    return found if found.condition else ControlAdapter(found.file, maps.get(str(condition or "canny")).name)


def condition_image(condition: str, source_input: ConditionInput, size: tuple[int, int]) -> Image.Image:
    """Condition image of an adapter: a map of `size` (width, height), or for `image` the uploaded image itself.

    Raises:
        VeneerError: no input, or an invalid one.
    """
    if source_input.source not in SOURCES.values():
        message = "choose what to condition on: a sketch, a photo, or a map."
        raise OptionError(message, option="source", given=source_input.source, expected=tuple(SOURCES.values()))
    if condition == IMAGE:
        if source_input.source == "sketch" and not source_input.photo:
            message = "this adapter needs an image. Choose 'A photo' and upload one."
            raise OptionError(message, option="source", given=source_input.source, expected=("photo",))
        return load_photo(source_input.photo)
    if source_input.source == "sketch":
        return sketch_map(load_sketch(source_input.sketch), condition, size)
    image = load_photo(source_input.photo)
    if source_input.source == "map":
        return resize_map(_crop(image, size), size)
    return maps.get(condition)(ImageOps.fit(image, size, Image.Resampling.LANCZOS))


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Center crop with the aspect ratio of `size`."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def output_size(context: Context, generation: GenerationRequest) -> tuple[int, int]:
    """Width and height of the generated images."""
    side, _ = (0, 0) if generation.size else context.generator.resolution(generation.base)
    height, width = generation.size or (side, side)
    if max(height, width) > LIMITS.side:
        message = f"the base model generates {width} × {height} pixels; expected at most {LIMITS.side}. Set width and height."
        raise OptionError(message, option="size", given=(width, height), expected=LIMITS.side)
    return width, height


def generate(
    context: Context,
    found: ControlAdapter,
    name: str,
    generation: GenerationRequest,
    source_input: ConditionInput,
    strength: Any,
    start: Any,
    end: Any,
) -> Iterator[tuple[list[GalleryItem], str]]:
    """Yields the condition image, then for each seed an image without and with control, and the progress.

    Raises:
        VeneerError: an invalid request.
    """
    strength = number(strength, "strength", 0, MAX_STRENGTH)
    start, end = number(start, "start", 0, 1), number(end, "end", 0, 1)
    if start > end:
        message = f"start is {start:g} and end is {end:g}; expected the start before the end."
        raise OptionError(message, option="start", given=(start, end))
    if 2 * generation.count > LIMITS.images:
        message = f"this needs {2 * generation.count} images; expected at most {LIMITS.images}. Choose fewer."
        raise OptionError(message, option="pictures", given=2 * generation.count, expected=LIMITS.images)
    assert found.condition is not None
    folder, image = new_folder(), condition_image(found.condition, source_input, output_size(context, generation))
    items: list[GalleryItem] = [(str(save_png(image, folder / "map.png", {"condition": found.condition})), "map")]
    yield items, "generating …"
    generation, note = truncate_prompts(context.generator, generation, {})
    use = AdapterUse(found.file, strength, functools.partial(_conditions, image), start, end)
    variants: tuple[dict[str, AdapterUse], dict[str, AdapterUse]] = ({}, {name: use})
    for without_batch, with_batch in zip(
        *(generate_batches(context.generator, generation, uses) for uses in variants), strict=True
    ):
        for without, followed in zip(without_batch, with_batch, strict=True):
            more = {"start": start, "end": end, "condition": found.condition}
            items = [
                *items,
                save_image(folder, without, generation, {}, "without"),
                save_image(folder, followed, generation, variants[1], "with", **more),
            ]
        yield items, f"{len(items) // 2} of {generation.count}" + (f"\n\n{note}" if note else "")


def _conditions(image: Image.Image, pipe: Any, control: Any) -> Any:
    return condition_inputs(pipe, control, image)
