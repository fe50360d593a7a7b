"""Presets of base models: prompts, resolution, sampling settings and training defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from veneer.injection.errors import BaseModelError

from .architectures import ARCHITECTURES
from .folders import read_json
from .loading import find

FILE = "veneer.json"
NUMBERS: Mapping[str, float] = {"resolution": 512, "guidance_scale": 7.5}
"""Entries whose default depends on the pipeline, and a value of each."""


@dataclass(frozen=True)
class Preset:
    """Defaults for a base model; the `veneer.json` in its folder overrides any of them.

    Args:
        templates: caption templates for training images without captions; `{concept}` is replaced by the concept.
        previews: preview prompts with the concept.
        unrelated: prompts without the concept, to measure drift.
        class_word: default class noun of a concept.
        resolution: side of the images in pixels (default: latent size times stride of the autoencoder).
        guidance_scale: scale of classifier-free guidance (default: that of the pipeline, such as 7.5 of Stable Diffusion).
        steps, negative_prompt: sampling settings.
        things, scenes: objects that the base generates well, and prompts with {thing}: for generated control training images.
        scene_caption: caption of such an image, which names the object only.
        training: defaults of training methods on this base, by method name: `options`, `where`, `learning_rate`, `steps`,
            `batch`, `schedule`, `caption_dropout`.
    """

    templates: tuple[str, ...] = ("a photo of {concept}",)
    previews: tuple[str, ...] = ("a photo of {concept}", "a photo of {concept} on the beach", "a painting of {concept}")
    unrelated: tuple[str, ...] = ("a photo of a house", "a photo of a dog", "a photo of an apple", "a photo of a car")
    class_word: str = "toy"
    resolution: int | None = None
    guidance_scale: float | None = None
    steps: int = 30
    negative_prompt: str = ""
    things: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()
    scene_caption: str = "a {thing}"
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def preset(base: str | Path = "bundled") -> Preset:
    """The preset of a base model: from `veneer.json` in its folder, else the defaults, as for an architecture without weights.

    Raises:
        BaseModelError: no such base model, or an unknown entry or wrong type in `veneer.json`.
    """
    if base in ARCHITECTURES and not Path(base).exists():
        return Preset()
    source = find(base)
    file = source / FILE if isinstance(source, Path) else None
    return parse(read_json(file), file) if file is not None and file.is_file() else Preset()


def parse(entries: dict[str, Any], file: Path) -> Preset:
    """Parses the entries of a `veneer.json`."""
    known: dict[str, Any] = {f.name: {} if f.name == "training" else f.default for f in fields(Preset)}
    given: dict[str, Any] = {}
    for name, value in entries.items():
        if name not in known:
            message = f"{file}: unknown entry {name!r}; expected one of {', '.join(known)}."
            raise BaseModelError(message, file=file, where=name, expected=tuple(known))
        value = tuple(value) if isinstance(value, list) else value
        if not _has_type_of(value, NUMBERS.get(name, known[name])):
            expected = NUMBERS.get(name, known[name])
            message = f"{file}: {name} is {value!r}; expected a value such as {expected!r}."
            raise BaseModelError(message, file=file, where=name, given=value, expected=expected)
        given[name] = value
    return Preset(**given)


def _has_type_of(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and bool(value) and all(isinstance(each, str) for each in value)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)
