"""What is asked of the painter: checked, drawn part by part, written with its settings, and read back from a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.pipelines.generate import taught_words

from veneer import base_models
from veneer.injection import OptionError, VeneerError
from veneer.training.report.previews import Preview, PreviewSettings, read_settings, save_preview

from ...context import escaped
from ...generator import Painter, Use
from ...limits import LIMITS
from ...uploads import picture
from ...workspace import Workspace, bounded, shown

PART = 4
"""Pictures that are drawn at once, and then shown."""
STRONGEST = 2.0
Shown = tuple[str, str]
"""A picture's file and what stands below it."""


@dataclass(frozen=True)
class Wish:
    """What is to be drawn, within the limits.

    Args:
        size: (height, width) in pixels; None for the base's own. `count`: pictures; seeds count up from `seed`.
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
        """For some of its pictures."""
        return PreviewSettings(tuple(seeds), self.steps, self.guidance, self.negative, self.size, PART)

    def parts(self) -> list[PreviewSettings]:
        """All its pictures, a few at a time."""
        seeds = range(self.seed, self.seed + self.count)
        return [self.settings(seeds[i : i + PART]) for i in range(0, len(seeds), PART)]


def wished(
    base: Any, prompt: Any, negative: Any, seed: Any, steps: Any, guidance: Any, width: Any, height: Any, count: Any
) -> Wish:
    """What a page was told, checked.

    Raises:
        VeneerError: a value that is none, or beyond the limits.
    """
    words = bounded(str(prompt or ""), "prompt")
    if not words:
        raise OptionError("the prompt is empty. Write what to draw, or take an example.", option="prompt", given="")
    sides = [int(number(side or 0, name, 0, LIMITS.side)) for side, name in ((height, "height"), (width, "width"))]
    if (sides[0] == 0) != (sides[1] == 0):
        message = "size: one side is given and one is 0; expected both, or 0 for both: the base's own size."
        raise OptionError(message, option="size", given=tuple(sides))
    return Wish(
        bounded(str(base or "bundled"), "base"),
        words,
        bounded(str(negative or ""), "negative prompt"),
        int(number(seed, "seed", 0, 2**53)),
        int(number(steps, "steps", 1, LIMITS.steps)),
        number(guidance, "guidance", 0, 30),
        (sides[0], sides[1]) if sides[0] else None,
        int(number(count, "number of pictures", 1, LIMITS.pictures)),
    )


def number(value: Any, name: str, least: float, most: float) -> float:
    """A number within bounds.

    Raises:
        VeneerError: none, or beyond them.
    """
    if value is None or value == "":
        message = f"{name} is empty; expected a number from {_plain(least)} to {_plain(most)}."
        raise OptionError(message, option=name, given=None, expected=(least, most))
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not least <= found <= most:
        message = f"{name} is {shown(str(value))}; expected a number from {_plain(least)} to {_plain(most)}."
        raise OptionError(message, option=name, given=value, expected=(least, most))
    return found


def _plain(value: float) -> str:
    """A bound without an exponent."""
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def used(workspace: Workspace, names: Sequence[str], strengths: Sequence[Any]) -> dict[str, Use]:
    """Adapters of a visitor by name, with strengths.

    Raises:
        VeneerError: too many, one twice, one that this visitor does not have, or a strength beyond ±2.
    """
    if len(names) > LIMITS.adapters:
        message = f"{len(names)} adapters; expected at most {LIMITS.adapters}. Leave some out."
        raise OptionError(message, option="adapters", given=len(names), expected=LIMITS.adapters)
    if len(set(names)) != len(names):
        message = "an adapter is there twice. Choose each once, and give it more strength."
        raise OptionError(message, option="adapters", given=tuple(names))
    found = {}
    for name, strength in zip(names, strengths, strict=False):
        file = workspace.adapter(str(name))
        found[str(name)] = Use(file, number(strength, f"strength of {shown(str(name))}", -STRONGEST, STRONGEST))
    return found


def drawn(painter: Painter, wish: Wish, uses: Mapping[str, Use], bare: bool = False) -> Iterator[list[Preview]]:
    """Pictures with these adapters, some at a time. `bare`: without them, and their own words replaced, from the same noise."""
    words: dict[str, str] = {}
    for use in uses.values() if bare else ():
        words |= taught_words(use.file)
    for part in wish.parts():
        yield painter.draw(wish.base, [wish.prompt], part, [] if bare else list(uses.values()), words)


def shortened(painter: Painter, wish: Wish, uses: Mapping[str, Use]) -> tuple[Wish, str]:
    """A wish whose prompt the base's text encoders take whole, and a note in Markdown on the words that were left out."""
    given, notes = {"prompt": wish.prompt, "negative": wish.negative}, []
    for name, text in given.items():
        kept = painter.shorten(wish.base, text, list(uses.values())) if text else text
        if kept != text:
            what = "negative prompt" if name == "negative" else name
            lost = escaped(text[len(kept) :].strip(" ,;:\n\t"))
            notes.append(f"⚠ The {what} is longer than the text encoder of this base takes. Left out: “{lost}”.")
            given[name] = kept
    return replace(wish, prompt=given["prompt"], negative=given["negative"]), "\n\n".join(notes)


def written(folder: Path, preview: Preview, wish: Wish, uses: Mapping[str, Use], label: str, **more: Any) -> Shown:
    """A picture as a file with its settings, and its caption."""
    adapters = [{"file": name, "scale": use.strength} for name, use in uses.items()]
    facts = {"prompt": wish.prompt, "base": wish.base, "adapters": adapters, **more}
    return str(save_preview(folder, preview, facts)), f"{label}, seed {preview.seed}" if label else f"seed {preview.seed}"


def defaults(base: str) -> tuple[int, float, str, int]:
    """Steps, guidance, negative prompt and side that suit a base; side 0 is its own.

    Raises:
        VeneerError: no such base.
    """
    usual = base_models.preset(bounded(str(base or "bundled"), "base"))
    return min(usual.steps, LIMITS.steps), usual.guidance_scale, usual.negative_prompt, usual.resolution or 0


def recalled(workspace: Workspace, path: str | Path | None) -> tuple[Wish, dict[str, float], list[str]]:
    """The settings in a picture: what was asked, the adapters' strengths, and adapters that this visitor does not have.

    Raises:
        VeneerError: no picture within the limits, one without settings, or with settings that are none.
    """
    if not path:
        message = "no picture is chosen. Click on one, or drop a PNG that was drawn here."
        raise OptionError(message, option="picture", given=None)
    picture(path)  # within the limits
    try:
        told: Any = read_settings(path)
    except VeneerError as error:
        name = shown(Path(path).name)
        message = f"{name}: no settings found; expected a PNG that was drawn here, as it was downloaded."
        raise VeneerError(message, file=name, where="settings", given=None) from error
    if not isinstance(told, dict):
        name = shown(Path(path).name)
        raise VeneerError(f"{name}: its settings are not those of a picture.", file=name, where="settings", given=told)
    size = told.get("size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (0, 0)
    texts = (told.get(name) for name in ("base", "prompt", "negative"))
    base, prompt, negative = (text if isinstance(text, str) else "" for text in texts)
    wish = wished(base, prompt, negative, told.get("seed"), told.get("steps"), told.get("guidance"), width, height, 1)
    known, there, missing = workspace.all_adapters(), dict[str, float](), list[str]()
    listed = told.get("adapters")
    for each in listed[: LIMITS.adapters] if isinstance(listed, list) else ():
        file = each.get("file") if isinstance(each, dict) else None
        if isinstance(file, str) and file in known:
            there[file] = number(each.get("scale"), "strength", -STRONGEST, STRONGEST)
        else:
            missing.append(shown(str(file)))
    return wish, there, missing
