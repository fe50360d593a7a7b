"""What is followed, and pictures that follow it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from veneer.control.generation import condition_of, follows, told
from veneer.control.maps import maps
from veneer.control.maps.resize import resized
from veneer.control.maps.sketch import sketch_map
from veneer.injection import OptionError, VeneerError
from veneer.training.report.previews import save_png

from ...context import Studio
from ...generator import Use
from ...limits import LIMITS
from ...workspace import Workspace, shown
from ..shared.generation_request import STRONGEST, Shown, Wish, drawn, number, shortened, written
from ..shared.images import new_folder, seen, sketched

SOURCES = {"A sketch": "sketch", "A photo: its map is made": "photo", "A map, as it is": "map"}
PICTURE = "image"
"""The condition of adapters that follow a picture itself."""


@dataclass(frozen=True)
class Follower:
    """An adapter that follows something: its file, and the condition, None where the file does not say."""

    file: Path
    condition: str | None


@dataclass(frozen=True)
class Brought:
    """What a visitor gives to follow: `source` of `SOURCES`, a sketch, and a photo's file."""

    source: str
    sketch: bytes | str | None = None
    photo: str | None = None


def followers(workspace: Workspace) -> dict[str, Follower]:
    """Adapters of a visitor that follow maps or pictures, by name."""
    found = {}
    for name, file in workspace.all_adapters().items():
        try:
            kind = follows(file)
        except (VeneerError, OSError):
            continue
        if kind:
            found[name] = Follower(file, PICTURE if kind == "embeds" else condition_of(file))
    return found


def follower(workspace: Workspace, name: Any, condition: Any = None) -> Follower:
    """One by its name, with the condition that was chosen where its file does not say.

    Raises:
        VeneerError: none was chosen, this visitor has none of that name, or what it follows is not known.
    """
    if not name:
        message = "no control is chosen. Choose one; if there is none yet, teach one below."
        raise OptionError(message, option="control", given=None)
    workspace.adapter(str(name))
    found = followers(workspace).get(str(name))
    if found is None:
        message = f"{shown(str(name))} follows nothing. Draw with it on the page Generate."
        raise OptionError(message, option="control", given=str(name))
    return found if found.condition else Follower(found.file, maps.get(str(condition or "canny")).name)


def guide(condition: str, given: Brought, size: tuple[int, int]) -> Image.Image:
    """What an adapter is to follow: a map of `size` (width, height), or for `image` the picture itself.

    Raises:
        VeneerError: nothing was brought, or what was cannot be used.
    """
    if given.source not in SOURCES.values():
        message = "choose what to follow: a sketch, a photo, or a map."
        raise OptionError(message, option="source", given=given.source, expected=tuple(SOURCES.values()))
    if condition == PICTURE:
        if given.source == "sketch" and not given.photo:
            message = "this control follows a picture. Choose 'A photo', and bring one."
            raise OptionError(message, option="source", given=given.source, expected=("photo",))
        return seen(given.photo)
    if given.source == "sketch":
        return sketch_map(sketched(given.sketch), condition, size)
    picture = seen(given.photo)
    if given.source == "map":
        return resized(_cropped(picture, size), size)
    return maps.get(condition)(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))


def _cropped(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture, in the shape of `size`."""
    scale = min(picture.width / size[0], picture.height / size[1])
    width, height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def size_of(studio: Studio, wish: Wish) -> tuple[int, int]:
    """Width and height of what is drawn."""
    side, _ = (0, 0) if wish.size else studio.painter.side(wish.base)
    height, width = wish.size or (side, side)
    if max(height, width) > LIMITS.side:
        message = f"the base draws {width} × {height} pixels; expected at most {LIMITS.side}. Give a size."
        raise OptionError(message, option="size", given=(width, height), expected=LIMITS.side)
    return width, height


def draw(
    studio: Studio, found: Follower, name: str, wish: Wish, given: Brought, strength: Any, start: Any, end: Any
) -> Iterator[tuple[list[Shown], str]]:
    """What is followed, then for each seed the picture without and with; so far, and how far it is.

    Raises:
        VeneerError: what cannot be drawn.
    """
    strength = number(strength, "strength", 0, STRONGEST)
    start, end = number(start, "start", 0, 1), number(end, "end", 0, 1)
    if start > end:
        message = f"it would begin at {start:g} and end at {end:g}; expected the start before the end."
        raise OptionError(message, option="start", given=(start, end))
    if 2 * wish.count > LIMITS.pictures:
        message = f"that would be {2 * wish.count} pictures; expected at most {LIMITS.pictures}. Ask for fewer."
        raise OptionError(message, option="pictures", given=2 * wish.count, expected=LIMITS.pictures)
    assert found.condition is not None
    folder, picture = new_folder(), guide(found.condition, given, size_of(studio, wish))
    shows: list[Shown] = [(str(save_png(picture, folder / "map.png", {"condition": found.condition})), "what is followed")]
    yield shows, "generating …"
    wish, note = shortened(studio.painter, wish, {})
    use = Use(found.file, strength, functools.partial(_told, picture), start, end)
    ways: tuple[dict[str, Use], dict[str, Use]] = ({}, {name: use})
    for bare, made in zip(*(drawn(studio.painter, wish, uses) for uses in ways), strict=True):
        for without, followed in zip(bare, made, strict=True):
            more = {"start": start, "end": end, "condition": found.condition}
            shows = [
                *shows,
                written(folder, without, wish, {}, "without"),
                written(folder, followed, wish, ways[1], "with", **more),
            ]
        yield shows, f"{len(shows) // 2} of {wish.count}" + (f"\n\n{note}" if note else "")


def _told(picture: Image.Image, pipe: Any, control: Any) -> Any:
    return told(pipe, control, picture)
