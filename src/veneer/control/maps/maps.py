"""Registry of conditions for control adapters."""

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
    """A condition of generated images.

    Args:
        name: name of the condition.
        function: computes the map of an image of any mode, an RGB image of the same size; None if maps are files.
        measures: metric of generated images, see `veneer.control.map_agreement`; None without `function`.
        description: one line.
    """

    name: str
    function: Callable[[Image.Image], Image.Image] | None
    measures: Measures | None
    description: str

    @property
    def is_computed(self) -> bool:
        """Whether the map is computed from the image."""
        return self.function is not None

    def __call__(self, image: Image.Image) -> Image.Image:
        """The map of an image.

        Raises:
            VeneerError: a condition without computed maps, or an image without a defined range of values.
        """
        if self.function is None:
            raise OptionError(
                f"condition {self.name!r}: {self.description}, so there is no map to compute. Provide map files, or use one of: "
                f"{', '.join(computed())}.",
                option="condition",
                given=self.name,
                expected=tuple(computed()),
            )
        return self.function(image)


CONDITIONS: dict[str, Condition] = {
    each.name: each
    for each in (
        Condition("canny", canny, "edges", "thin lines at edges"),
        Condition("soft_edge", soft_edge, "edges", "edges with brightness by strength"),
        Condition("scribble", scribble, "edges", "thick lines at the main edges"),
        Condition("grey", grey, "tones", "brightness without color"),
        Condition("blur", blur, "tones", "blurred colors"),
        Condition("palette", palette, "tones", "the mean colors on a coarse grid"),
        Condition("low_resolution", low_resolution, "tones", "the image enlarged from a thumbnail"),
        Condition("mask", mask, "region", "white foreground on black, for backgrounds of few colors"),
        Condition("pairs", None, None, "map files beside the photos"),
        Condition("image", None, None, "the image embedding"),
    )
}
"""Every condition by its name."""


def computed() -> list[str]:
    """Names of the conditions whose maps are computed from the image."""
    return [name for name, each in CONDITIONS.items() if each.is_computed]


def get(name: str) -> Condition:
    """The condition of a name.

    Raises:
        UnknownName: an unknown name; the message suggests similar ones.
    """
    if name not in CONDITIONS:
        close = difflib.get_close_matches(name, CONDITIONS, 3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        message = f"condition: unknown name {name!r}.{hint} Expected one of: {', '.join(CONDITIONS)}."
        raise UnknownName(message, name, "condition", close, expected=tuple(CONDITIONS))
    return CONDITIONS[name]
