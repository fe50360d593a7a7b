"""Image generation requests: validation, generation in batches, saving with settings, and reading settings back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.pipelines.generate import words_for_base

from veneer import base_models
from veneer.injection import OptionError, VeneerError
from veneer.training.report.png_metadata import read_settings
from veneer.training.report.previews import Preview, PreviewSettings, save_preview

from ...base_access import check_access
from ...context import escape_markup
from ...generator import AdapterUse, Generator
from ...limits import LIMITS
from ...uploads import load_image
from ...workspace import Workspace, check_text, printable

GUIDANCE = 7.5
"""Guidance scale that is shown for a base model whose pipeline decides."""
BATCH_SIZE = 4
"""Images generated per batch; each batch is shown when it is done."""
MAX_STRENGTH = 2.0
GalleryItem = tuple[str, str]
"""Image file and caption."""


@dataclass(frozen=True)
class GenerationRequest:
    """A validated generation request.

    Args:
        size: (height, width) in pixels (default: the native resolution). `count`: images; seeds count up from `seed`.
    """

    base: str
    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    size: tuple[int, int] | None = None
    count: int = 1

    def settings(self, seeds: Sequence[int]) -> PreviewSettings:
        """Sampling settings for some of the seeds."""
        return PreviewSettings(tuple(seeds), self.steps, self.guidance, self.negative, self.size, BATCH_SIZE)

    def batches(self) -> list[PreviewSettings]:
        """Sampling settings of all images, in batches."""
        seeds = range(self.seed, self.seed + self.count)
        return [self.settings(seeds[i : i + BATCH_SIZE]) for i in range(0, len(seeds), BATCH_SIZE)]


def parse_request(
    base: Any, prompt: Any, negative: Any, seed: Any, steps: Any, guidance: Any, width: Any, height: Any, count: Any
) -> GenerationRequest:
    """Validates the values of the form fields.

    Raises:
        VeneerError: a value is invalid or beyond the limits.
    """
    words = check_text(str(prompt or ""), "prompt")
    if not words:
        raise OptionError("the prompt is empty. Write a prompt, or use an example.", option="prompt", given="")
    sides = [int(number(side or 0, name, 0, LIMITS.side)) for side, name in ((height, "height"), (width, "width"))]
    if (sides[0] == 0) != (sides[1] == 0):
        message = "size: one side is 0; expected two sides, or 0 for both (the native resolution)."
        raise OptionError(message, option="size", given=tuple(sides))
    return GenerationRequest(
        check_access(check_text(str(base or "bundled"), "base")),
        words,
        check_text(str(negative or ""), "negative prompt"),
        int(number(seed, "seed", 0, 2**53)),
        int(number(steps, "steps", 1, LIMITS.steps)),
        number(guidance, "guidance", 0, 30),
        (sides[0], sides[1]) if sides[0] else None,
        int(number(count, "number of images", 1, LIMITS.images)),
    )


def number(value: Any, name: str, least: float, most: float) -> float:
    """Parses a number within bounds.

    Raises:
        VeneerError: not a number, or out of bounds.
    """
    if value is None or value == "":
        message = f"{name} is empty; expected a number from {_plain(least)} to {_plain(most)}."
        raise OptionError(message, option=name, given=None, expected=(least, most))
    try:
        parsed = float(value)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if not least <= parsed <= most:
        message = f"{name} is {printable(str(value))}; expected a number from {_plain(least)} to {_plain(most)}."
        raise OptionError(message, option=name, given=value, expected=(least, most))
    return parsed


def _plain(value: float) -> str:
    """Formats a bound without an exponent."""
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def select_adapters(
    workspace: Workspace, names: Sequence[str], strengths: Sequence[Any], limit: int = LIMITS.adapters
) -> dict[str, AdapterUse]:
    """Adapters of a user by name, with strengths; at most `limit`.

    Raises:
        VeneerError: too many, duplicate or unknown adapters, or a strength beyond ±2.
    """
    if len(names) > limit:
        message = f"{len(names)} adapters; expected at most {limit}. Remove some."
        raise OptionError(message, option="adapters", given=len(names), expected=limit)
    if len(set(names)) != len(names):
        message = "an adapter is selected twice. Select each once, and increase its strength instead."
        raise OptionError(message, option="adapters", given=tuple(names))
    uses = {}
    for name, strength in zip(names, strengths, strict=False):
        file = workspace.adapter(str(name))
        uses[str(name)] = AdapterUse(file, number(strength, f"strength of {printable(str(name))}", -MAX_STRENGTH, MAX_STRENGTH))
    return uses


def generate_batches(
    generator: Generator, generation: GenerationRequest, uses: Mapping[str, AdapterUse], without_adapters: bool = False
) -> Iterator[list[Preview]]:
    """Generates images in batches.

    Args:
        without_adapters: generate with the base model alone from the same noise; trained tokens are replaced in the prompt.
    """
    words: dict[str, str] = {}
    for use in uses.values() if without_adapters else ():
        words |= words_for_base(use.file)
    for batch in generation.batches():
        yield generator.generate(
            generation.base, [generation.prompt], batch, [] if without_adapters else list(uses.values()), words
        )


def truncate_prompts(
    generator: Generator, generation: GenerationRequest, uses: Mapping[str, AdapterUse]
) -> tuple[GenerationRequest, str]:
    """Request with prompts truncated to the text encoders' limit, and a note in Markdown on the removed text."""
    prompts, notes = {"prompt": generation.prompt, "negative": generation.negative}, []
    for name, text in prompts.items():
        truncated = generator.shorten(generation.base, text, list(uses.values())) if text else text
        if truncated != text:
            label = "negative prompt" if name == "negative" else name
            left_out = escape_markup(text[len(truncated) :].strip(" ,;:\n\t"))
            notes.append(f"⚠ The {label} is longer than the text encoder of this base model supports. Left out: “{left_out}”.")
            prompts[name] = truncated
    return replace(generation, prompt=prompts["prompt"], negative=prompts["negative"]), "\n\n".join(notes)


def save_image(
    folder: Path, preview: Preview, generation: GenerationRequest, uses: Mapping[str, AdapterUse], label: str, **more: Any
) -> GalleryItem:
    """Saves an image with its settings; returns the file and a caption."""
    adapters = [{"file": name, "scale": use.strength} for name, use in uses.items()]
    facts = {"prompt": generation.prompt, "base": generation.base, "adapters": adapters, **more}
    return str(save_preview(folder, preview, facts)), f"{label}, seed {preview.seed}" if label else f"seed {preview.seed}"


def defaults(base: str) -> tuple[int, float, str, int]:
    """Default steps, guidance scale, negative prompt and side of a base model; side 0 is the native resolution.

    Raises:
        VeneerError: unknown base model.
    """
    preset = base_models.preset(check_access(check_text(str(base or "bundled"), "base")))
    guidance = _shown_guidance(preset.guidance_scale)
    return min(preset.steps, LIMITS.steps), guidance, preset.negative_prompt, preset.resolution or 0


def _shown_guidance(scale: Any) -> Any:
    """A guidance scale for the form, which has no entry for the default of a pipeline."""
    return GUIDANCE if scale is None else scale


def read_request(workspace: Workspace, path: str | Path | None) -> tuple[GenerationRequest, dict[str, float], list[str]]:
    """Reads the settings saved in an image: the request, adapter strengths, and adapters that the user does not have.

    Raises:
        VeneerError: not an image within the limits, or one without valid settings.
    """
    if not path:
        message = "no image is selected. Click on one, or upload a PNG that was generated here."
        raise OptionError(message, option="picture", given=None)
    load_image(path)  # checks the limits
    try:
        settings: Any = read_settings(path)
    except VeneerError as error:
        name = printable(Path(path).name)
        message = f"{name}: no settings found; expected an unmodified PNG that was generated here."
        raise VeneerError(message, file=name, where="settings", given=None) from error
    if not isinstance(settings, dict):
        name = printable(Path(path).name)
        raise VeneerError(
            f"{name}: its settings are not those of a generated image.", file=name, where="settings", given=settings
        )
    size = settings.get("size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (0, 0)
    texts = (settings.get(name) for name in ("base", "prompt", "negative"))
    base, prompt, negative = (text if isinstance(text, str) else "" for text in texts)
    guidance = _shown_guidance(settings["guidance"]) if "guidance" in settings else None
    generation = parse_request(base, prompt, negative, settings.get("seed"), settings.get("steps"), guidance, width, height, 1)
    known, strengths, missing = workspace.all_adapters(), dict[str, float](), list[str]()
    listed = settings.get("adapters")
    for each in listed[: LIMITS.adapters] if isinstance(listed, list) else ():
        file = each.get("file") if isinstance(each, dict) else None
        if isinstance(file, str) and file in known:
            strengths[file] = number(each.get("scale"), "strength", -MAX_STRENGTH, MAX_STRENGTH)
        else:
            missing.append(printable(str(file)))
    return generation, strengths, missing
