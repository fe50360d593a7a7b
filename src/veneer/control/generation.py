"""Generation with maps and images as conditions, for `veneer control generate`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from veneer import base_models
from veneer.base_models.devices import Dtype, resolve_device
from veneer.base_models.loading import load_on_device
from veneer.base_models.schedulers import Scheduler, other_scheduler
from veneer.formats import format_of, load_all, read
from veneer.formats.native import KEY
from veneer.injection import Attachment, VeneerError, methods
from veneer.injection.errors import OptionError
from veneer.training import prepare_base
from veneer.training.data.image_io import read_photo
from veneer.training.families import Family, family
from veneer.training.report.phases import PhaseReport
from veneer.training.report.png_metadata import save_png
from veneer.training.report.previews import check_counts, previews, save_preview, settings_of

from .image_embedding import embedder
from .maps import maps
from .maps.resize import resize_map


@dataclass(frozen=True)
class ControlGenerateConfig:
    """Configuration of `veneer control generate` and its defaults.

    Args:
        prompt: one or more prompts.
        adapter: adapter files, run folders or hub names, each with an optional strength, such as `runs/canny-controlnet:0.8`;
            LoRAs and token embeddings may be among them.
        image: a photo for each control adapter, in order; its map is computed as in training.
        map: a map for each control adapter, instead of photos.
        condition: how maps are computed, one of `veneer control train` (default: that of the adapter).
        start: share of the noise schedule after which the control starts, 0 to 1; 0 is pure noise.
        end: share of the noise schedule after which the control ends, 0 to 1.
        base: base model: `bundled`, a diffusers folder, a .safetensors file or a hub name (default: that of the first adapter).
        negative_prompt: what the images should not show (default: the preset's, else empty).
        images_per_prompt: images to generate per prompt; their seeds count up from `seed`.
        seed: seed of the first image.
        steps: denoising steps (default: the base model's).
        guidance_scale: scale of classifier-free guidance (default: the base model's).
        size: `WIDTHxHEIGHT` in pixels, or one side of a square; in Python (height, width) (default: the base model's).
        scheduler: scheduler (sampler), with the base model's noise schedule (default: the base model's).
        dtype: dtype of the frozen base model; adapters are in float32 (default: bfloat16 on a GPU, float32 on a CPU).
        quantize: quantization of frozen linear layers, as in `veneer personalize`: a kind such as `nf4`, or COMPONENT=KIND
            (default: none).
        device: device such as `cuda` (default: a GPU if there is one).
        out: folder for the images, whose names are prompt and seed; no image is overwritten.
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
    scheduler: Scheduler | None = None
    dtype: Dtype | None = None
    quantize: tuple[str, ...] = ()
    device: str | None = None
    out: Path = Path("images")

    def __post_init__(self) -> None:
        check_counts(self.images_per_prompt, self.steps)
        base_models.parse_quantize(self.quantize)


def generate_with_control(config: ControlGenerateConfig, adapters: list[tuple[Path, float]], base: str) -> list[Path]:
    """Generates images and writes one PNG per image, and the maps as `map-1.png` and so on.

    Args:
        adapters: paths and strengths. `base`: their base model.
    Raises:
        VeneerError: the number of images differs from that of the control adapters, or an image has another aspect ratio than the
            output.
    """
    if config.image and config.map:
        message = "expected either --image, whose maps are computed, or --map, the maps themselves, not both."
        raise OptionError(message, option="map", expected="image or map")
    device = resolve_device(config.device)
    report = PhaseReport(None, sys.stderr)
    report("loading")
    pipe = load_on_device(base, device, config.dtype, config.quantize)
    pipe.scheduler = other_scheduler(pipe.scheduler, config.scheduler)
    prepare_base.freeze(pipe)
    kind = family(pipe)
    loaded = [(a, path) for path, scale in adapters for a in load_all(pipe, path, scale=scale)]
    controls = [(a, path) for a, path in loaded if a.method.conditions]
    files = config.map or config.image
    if len(files) != len(controls):
        message = f"{len(files)} images for {len(controls)} control adapters; expected one per adapter, in order."
        raise OptionError(message, option="image", given=len(files), expected=len(controls))
    side = kind.resolution
    size = config.size or (side, side)
    settings = settings_of(replace(config, size=size), base_models.preset(base))
    shown = []
    with contextlib.ExitStack() as scopes:
        for number, ((control, path), file) in enumerate(zip(controls, files, strict=True), 1):
            image, given = _load_condition(config, kind, control, path, file, size)
            scopes.enter_context(control.condition(**given, start=config.start, end=config.end, pipeline=pipe))
            shown.append((image, config.out / f"map-{number}.png", {"of": str(file)}))
        made = previews(pipe, config.prompt, settings, progress=report("generating", len(config.prompt) * len(settings.seeds)))
    config.out.mkdir(parents=True, exist_ok=True)
    facts = {"base": base, "adapters": list(config.adapter), "given": [str(f) for f in files]}
    return [*(save_png(*each) for each in shown), *(save_preview(config.out, preview, facts) for preview in made)]


def _load_condition(
    config: ControlGenerateConfig, kind: Family, control: Attachment, path: Path, file: Path, size: tuple[int, int]
) -> tuple[Image.Image, Mapping[str, Any]]:
    """Condition of an adapter: as an image, and as inputs by name."""
    image = read_photo(file)
    if "embeds" in control.method.conditions:
        return image, condition_inputs(kind.pipe, control, image)
    fits = abs(image.width * size[0] - image.height * size[1]) <= 0.01 * image.height * size[1]
    if not fits:
        message = f"{file} has {image.width} × {image.height} pixels, the output {size[1]} × {size[0]}. Crop the image."
        raise VeneerError(message, file=file, given=image.size, expected=size[::-1])
    if config.map:
        found = resize_map(image, size[::-1])
    else:
        name = config.condition or condition_of(path)
        if name is None:
            message = f"{path} does not name its condition; set --condition, or provide the map with --map."
            raise OptionError(message, option="condition", file=path)
        found = maps.get(name)(image.resize(size[::-1], Image.Resampling.LANCZOS))
    return found, condition_inputs(kind.pipe, control, found)


def condition_inputs(pipe: Any, control: Attachment, image: Image.Image) -> Mapping[str, Any]:
    """Condition inputs of a control adapter by name: the image embedding, or the map."""
    return {"embeds": embedder(pipe)([image])} if "embeds" in control.method.conditions else {"image": image}


def condition_argument(path: Path) -> str | None:
    """Condition argument of the adapter in a file: `image` (a map) or `embeds` (an image embedding); None without conditions.

    Raises:
        LoadError: an incomplete safetensors file.
    """
    file = read(path)
    known = format_of(file)
    present = {layer.method for layer in known.layers(file)} if known else set()
    conditions = [methods.get(name).conditions for name in methods.names() if name in present]
    return next((names[0] for names in conditions if names), None)


def condition_of(path: Path) -> str | None:
    """The condition in the metadata of an adapter file, or None."""
    file = read(path)
    header = file.json(KEY) if KEY in file.metadata else {}
    found: str | None = header.get("provenance", {}).get("condition")
    return found if found != "pairs" else None
