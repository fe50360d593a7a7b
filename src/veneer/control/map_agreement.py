"""How well a picture follows a map: the map is computed anew from the picture and compared with the wanted one.

With w the wanted map and m the new one:

- **canny, scribble**: F1 with a tolerance of t pixels. A white pixel of m is right if one of w is no further than t (Euclidean),
  and one of w is found if one of m is no further than t; precision P and recall R are their shares, F1 = 2 P R / (P + R).
  t = max(1, round(side / 200)) of the short side: 1 at 64, 3 at 512, 5 at 1024. White is 128 and more. Two empty maps: 1; one: 0.
- **soft_edge**: Pearson's correlation of the two maps, each smoothed by a Gaussian of σ = t, clipped at 0. A correlation and no
  F1, since the strength of edges is graded, and a picture of half the contrast has the same edges: it scores the same. The mean
  is taken off, so the maps of unrelated pictures score near 0, where a sum of smaller values would score high for faint grey
  everywhere. A map is empty if its values differ by less than 3 of 255. Two empty maps: 1; one: 0.
- **grey, blur, palette, low_resolution**: 1 - RMSE(m, w) / RMSE(c, w), clipped at 0, where c is the best picture of one colour,
  the mean of w. A flat picture scores 0. RMSE(c, w) counts as 1 of 255 where it is less, so a flat w asks for its own colour.
- **mask**: intersection over union of the white pixels. Two empty maps: 1; one: 0.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from veneer.injection.errors import OptionError

from .maps.color_modes import Array, luminance, upright_rgb
from .maps.maps import Condition, computed, get

T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
Score = Callable[[Image.Image, Image.Image], float]


def agreement(condition: Condition | str, wanted_map: Image.Image, picture: Image.Image) -> float:
    """How well `picture` follows `wanted_map`, in [0, 1]; 1 is best. The formula of each condition: see the module.

    Args:
        condition: one that is computed, or its name.
        wanted_map: of the picture's size.
        picture: the generated one.

    Raises:
        UnknownName: no such condition.
        VeneerError: a condition that is not computed, or two sizes.
    """
    condition = get(condition) if isinstance(condition, str) else condition
    if condition.measures is None:
        raise OptionError(
            f"agreement: no picture can be measured by {condition.name!r} ({condition.description}); expected one of: "
            f"{', '.join(computed())}.",
            option="condition",
            given=condition.name,
            expected=tuple(computed()),
        )
    if wanted_map.size != picture.size:
        wanted, given = ("{} x {}".format(*each.size) for each in (wanted_map, picture))
        raise OptionError(
            f"agreement: a map of {wanted} for a picture of {given}; expected one size. Compute the map at the picture's size, "
            "or resize it with `veneer.control.maps.resize.resized`.",
            option="wanted_map",
            given=wanted_map.size,
            expected=picture.size,
        )
    score = correlation if condition.name == "soft_edge" else _SCORES[condition.measures]
    return score(wanted_map, condition(picture))


def wrong(maps: Sequence[T]) -> list[T]:
    """Every item's map replaced by another item's, always the same way: item i gets that of i + n // 2, modulo n.

    What a control adapter scores with wrong maps against the right ones tells whether it looks at its map.

    Raises:
        VeneerError: fewer than two maps.
    """
    if len(maps) < 2:
        message = f"wrong: {len(maps)} map(s); expected at least 2, so that each can get another's."
        raise OptionError(message, option="maps", given=len(maps), expected=2)
    half = len(maps) // 2
    return [*maps[half:], *maps[:half]]


def tolerance(size: tuple[int, int]) -> int:
    """Pixels by which an edge may lie elsewhere in a picture of (width, height)."""
    return max(1, round(min(size) / 200))


def line_f1(wanted: Image.Image, made: Image.Image) -> float:
    """F1 of white lines with a tolerance; see the module."""
    reach = tolerance(wanted.size)
    w, m = _white(wanted), _white(made)
    if not w.any() or not m.any():
        return float(w.any() == m.any())
    precision, recall = _near(m, w, reach), _near(w, m, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def correlation(wanted: Image.Image, made: Image.Image) -> float:
    """Correlation of smoothed brightness, at least 0; see the module."""
    maps = [luminance(each) for each in (wanted, made)]
    empty = [bool(np.ptp(each) < 2.5 / 255) for each in maps]
    if any(empty):
        return float(all(empty))
    w, m = (_centred(ndimage.gaussian_filter(each, tolerance(wanted.size), mode="nearest")) for each in maps)
    spread = float(np.sqrt((w * w).sum() * (m * m).sum()))
    return float(np.clip((w * m).sum() / spread, 0, 1)) if spread else 0.0


def explained(wanted: Image.Image, made: Image.Image) -> float:
    """The share of the spread of colours that is explained; see the module."""
    w, m = (np.asarray(upright_rgb(each), np.float64) for each in (wanted, made))
    spread = np.sqrt(((w - w.mean((0, 1))) ** 2).mean())
    return float(max(0.0, 1 - np.sqrt(((m - w) ** 2).mean()) / max(spread, 1.0)))


def overlap(wanted: Image.Image, made: Image.Image) -> float:
    """Intersection over union of what is white; see the module."""
    w, m = _white(wanted), _white(made)
    union = int((w | m).sum())
    return int((w & m).sum()) / union if union else 1.0


_SCORES: dict[str, Score] = {"edges": line_f1, "tones": explained, "region": overlap}


def _near(ours: Mask, theirs: Mask, reach: int) -> float:
    """The share of our pixels with one of theirs within reach."""
    return float((ndimage.distance_transform_edt(~theirs)[ours] <= reach).mean())


def _white(picture: Image.Image) -> Mask:
    white: Mask = luminance(picture) >= 128 / 255
    return white


def _centred(values: Array) -> npt.NDArray[np.float64]:
    return values.astype(np.float64) - values.mean(dtype=np.float64)
