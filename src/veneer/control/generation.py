"""Drawing under maps and pictures: what `veneer control generate` does."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from veneer import base_models
from veneer.base_models.devices import resolve_device
from veneer.formats import format_of, load_all, read
from veneer.formats.native import KEY
from veneer.injection import Attachment, VeneerError, methods
from veneer.injection.errors import OptionError
from veneer.training import param_groups
from veneer.training.data.image_io import read_photo
from veneer.training.families import Family, family
from veneer.training.report.previews import PreviewSettings, check_counts, previews, save_png, save_preview

from .image_embedding import embedder
from .maps import maps
from .maps.resize import resized


@dataclass(frozen=True)
class DrawConfig:
    """Configuration of `veneer control generate` and its defaults.

    Args:
        prompt: one or more prompts.
        adapter: files or folders, each with an optional strength, such as `runs/canny-controlnet:0.8`. Adapters without a
            condition (LoRA, token embeddings) are applied as well.
        image: a photo per adapter with a condition, in order; its map is computed as in training.
        map: the maps themselves, instead of photos.
        condition: how maps are computed (default: as recorded in the file).
        start: share of the noise schedule after which the control starts, 0 to 1.
        end: share of the noise schedule after which the control ends, 0 to 1.
        base: base model: `bundled`, a folder or a hub name (default: the base model that the first adapter was trained on).
        negative_prompt: negative prompt (default: the base model's).
        images_per_prompt: images to generate per prompt; their seeds count up from `seed`.
        seed: seed of the first image.
        steps: denoising steps (default: the base model's).
        guidance_scale: scale of classifier-free guidance (default: the base model's).
        size: height and width in pixels (default: the base model's).
        device: device such as `cuda` (default: a GPU if there is one).
        out: folder for the images.
    """

    prompt: tuple[str, ...]
    adapter: tuple[str, ...] = ()
    image: tuple[Path, ...] = ()
    map: tuple[Path, ...] = ()
    condition: str | None = None
    start: float = 0.0
    end: float = 1.0
    base: str | None = None
    negative_prompt: str | None = None
    images_per_prompt: int = 1
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    device: str | None = None
    out: Path = Path("images")

    def __post_init__(self) -> None:
        check_counts(self.images_per_prompt, self.steps)


def draw_under(config: DrawConfig, adapters: list[tuple[Path, float]], base: str) -> list[Path]:
    """Draw, and write one PNG a picture, and `map-1.png` and so on.

    Args:
        adapters: paths and strengths. `base`: of all.
    Raises:
        VeneerError: other numbers of photos and of adapters that follow something, or of another shape than is drawn.
    """
    if config.image and config.map:
        message = "give --image, whose maps are computed, or --map, the maps themselves; not both."
        raise OptionError(message, option="map", expected="image or map")
    preset, device = base_models.preset(base), resolve_device(config.device)
    pipe = base_models.load(base).to(device)
    param_groups.freeze(pipe)
    kind = family(pipe)
    loaded = [(a, path) for path, scale in adapters for a in load_all(pipe, path, scale=scale)]
    following = [(a, path) for a, path in loaded if a.method.conditions]
    files = config.map or config.image
    if len(files) != len(following):
        message = f"{len(files)} pictures for {len(following)} adapters that follow one; expected one for each, in order."
        raise OptionError(message, option="image", given=len(files), expected=len(following))
    side = kind.resolution
    size = config.size or (side, side)
    settings = PreviewSettings(
        tuple(range(config.seed, config.seed + config.images_per_prompt)), config.steps or preset.steps,
        preset.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        preset.negative_prompt if config.negative_prompt is None else config.negative_prompt, size, 4,
    )  # fmt: skip
    config.out.mkdir(parents=True, exist_ok=True)
    written = []
    with contextlib.ExitStack() as scopes:
        for number, ((control, path), file) in enumerate(zip(following, files, strict=True), 1):
            picture, given = _given(config, kind, control, path, file, size)
            scopes.enter_context(control.condition(**given, start=config.start, end=config.end, pipeline=pipe))
            written.append(save_png(picture, config.out / f"map-{number}.png", {"of": str(file)}))
        made = previews(pipe, config.prompt, settings)
    facts = {"base": base, "adapters": list(config.adapter), "given": [str(f) for f in files]}
    return [*written, *(save_preview(config.out, preview, facts) for preview in made)]


def _given(
    config: DrawConfig, kind: Family, control: Attachment, path: Path, file: Path, size: tuple[int, int]
) -> tuple[Image.Image, Mapping[str, Any]]:
    """What an adapter is given, as a picture and by its name."""
    picture = read_photo(file)
    if "embeds" in control.method.conditions:
        return picture, told(kind.pipe, control, picture)
    fits = abs(picture.width * size[0] - picture.height * size[1]) <= 0.01 * picture.height * size[1]
    if not fits:
        message = f"{file} has {picture.width} × {picture.height} pixels, and {size[1]} × {size[0]} are drawn. Crop it alike."
        raise VeneerError(message, file=file, given=picture.size, expected=size[::-1])
    if config.map:
        found = resized(picture, size[::-1])
    else:
        name = config.condition or condition_of(path)
        if name is None:
            message = f"{path} does not say what it follows; say it with --condition, or give the map itself with --map."
            raise OptionError(message, option="condition", file=path)
        found = maps.get(name)(picture.resize(size[::-1], Image.Resampling.LANCZOS))
    return found, told(kind.pipe, control, found)


def told(pipe: Any, control: Attachment, picture: Image.Image) -> Mapping[str, Any]:
    """What an adapter that follows something is given, by name: the embedding of a picture, or a map as it is."""
    return {"embeds": embedder(pipe)([picture])} if "embeds" in control.method.conditions else {"image": picture}


def follows(path: Path) -> str | None:
    """What the adapter in a file is given when it draws: `image` (a map) or `embeds` (a picture); None for nothing.

    Raises:
        LoadError: it is no whole safetensors file.
    """
    file = read(path)
    known = format_of(file)
    there = {layer.method for layer in known.layers(file)} if known else set()
    given = [methods.get(name).conditions for name in methods.names() if name in there]
    return next((names[0] for names in given if names), None)


def condition_of(path: Path) -> str | None:
    """What an adapter's file says that it follows; None for files that do not."""
    file = read(path)
    header = file.json(KEY) if KEY in file.metadata else {}
    found: str | None = header.get("provenance", {}).get("condition")
    return found if found != "pairs" else None
