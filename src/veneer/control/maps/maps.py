"""Conditions by name: what a control adapter can be told about a picture."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from veneer.injection.errors import OptionError, UnknownName

from .edges import canny, scribble, soft_edge
from .foreground import mask
from .tones import blur, grey, low_resolution, palette

Measures = Literal["edges", "tones", "region"]


@dataclass(frozen=True)
class Condition:
    """What a picture can be made to follow.

    Args:
        name: of the condition.
        function: from a picture of any mode to its map, an RGB picture of the same size; None for what is given, not computed.
        measures: what a generated picture is measured by, see `veneer.control.map_agreement`; None for what is not computed.
        description: one line.
    """

    name: str
    function: Callable[[Image.Image], Image.Image] | None
    measures: Measures | None
    description: str

    @property
    def is_computed(self) -> bool:
        """Whether the map comes from the picture itself."""
        return self.function is not None

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The map of a picture.

        Raises:
            VeneerError: the condition is given, not computed; a picture without a stated range of values.
        """
        if self.function is None:
            raise OptionError(
                f"condition {self.name!r}: {self.description}, so there is no map to compute. Give the maps yourself, or take "
                f"one of: {', '.join(computed())}.",
                option="condition",
                given=self.name,
                expected=tuple(computed()),
            )
        return self.function(picture)


CONDITIONS: dict[str, Condition] = {
    each.name: each
    for each in (
        Condition("canny", canny, "edges", "thin lines at every clear edge"),
        Condition("soft_edge", soft_edge, "edges", "edges as bright as they are strong"),
        Condition("scribble", scribble, "edges", "thick lines at the main edges, like a quick drawing"),
        Condition("grey", grey, "tones", "brightness without colour"),
        Condition("blur", blur, "tones", "smooth spots of colour"),
        Condition("palette", palette, "tones", "the mean colours on a coarse grid"),
        Condition("low_resolution", low_resolution, "tones", "the picture enlarged from a thumbnail"),
        Condition("mask", mask, "region", "the object white on black, told from a background of few colours"),
        Condition("pairs", None, None, "maps that lie beside the photos"),
        Condition("image", None, None, "the picture itself, as its features"),
    )
}
"""Every condition by its name."""


def computed() -> list[str]:
    """Names of the conditions whose maps are computed from the picture."""
    return [name for name, each in CONDITIONS.items() if each.is_computed]


def get(name: str) -> Condition:
    """The condition of a name.

    Raises:
        UnknownName: there is none; close names are told.
    """
    if name not in CONDITIONS:
        close = difflib.get_close_matches(name, CONDITIONS, 3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        message = f"condition: no {name!r}.{hint} There are: {', '.join(CONDITIONS)}."
        raise UnknownName(message, name, "condition", close, expected=tuple(CONDITIONS))
    return CONDITIONS[name]
